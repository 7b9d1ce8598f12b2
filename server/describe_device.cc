// SPDX-License-Identifier: Apache-2.0
#include "server/describe_device.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nlohmann/json.hpp"

extern char** environ;

namespace gradwire {
namespace {

// A description is some hundred bytes.
constexpr size_t kLimit = 1 << 16;

struct Output {
  int wait_status = -1;
  std::string text;  // of both streams
};

absl::StatusOr<Output> RunProgram(const std::string& program,
                                  const std::string& argument,
                                  const std::string& second) {
  std::array<int, 2> pipe_ends;
  if (pipe2(pipe_ends.data(), O_CLOEXEC) != 0) {
    return absl::ErrnoToStatus(errno, "no pipe");
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], STDERR_FILENO);
  std::string copies[] = {program, argument, second};
  char* argv[] = {copies[0].data(), copies[1].data(), copies[2].data(),
                  nullptr};
  pid_t pid = -1;
  const int failure =
      posix_spawn(&pid, program.c_str(), &actions, nullptr, argv, environ);
  posix_spawn_file_actions_destroy(&actions);
  close(pipe_ends[1]);
  Output output;
  if (failure == 0) {
    std::array<char, 4096> part;
    ssize_t n = 0;
    while ((n = read(pipe_ends[0], part.data(), part.size())) != 0) {
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) break;
      if (output.text.size() < kLimit) {
        output.text.append(part.data(), static_cast<size_t>(n));
      }
    }
    while (waitpid(pid, &output.wait_status, 0) < 0 && errno == EINTR) {
    }
  }
  close(pipe_ends[0]);
  if (failure != 0) return absl::ErrnoToStatus(failure, program);
  return output;
}

}  // namespace

absl::StatusOr<std::string> DescribeDevice(const std::string& rank_binary,
                                           const std::string& device) {
  if (device == "cpu") return NewCpuKernels()->description();
  if (device != "cuda") {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "DEVICE_UNKNOWN")
        .With("field", "device")
        .With("value", device)
        .Message("--device is \"" + device + "\"; use cpu or cuda");
  }
  const auto output = RunProgram(rank_binary, "--describe", "--device=cuda");
  std::string why;
  if (!output.ok()) {
    why = std::string(output.status().message());
  } else {
    const auto line = output->text.find('{');
    const auto said = nlohmann::json::parse(
        line == std::string::npos ? "" : output->text.substr(line), nullptr,
        false);
    if (output->wait_status == 0 && said.is_object() &&
        said.value("device", "") != "") {
      return said.value("device", "");
    }
    why = output->text;
  }
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "DEVICE_NOT_FOUND")
      .With("field", "device")
      .With("value", device)
      .Message("ranks cannot compute with CUDA here: " + why + "; try " +
               rank_binary + " --describe --device=cuda");
}

}  // namespace gradwire
