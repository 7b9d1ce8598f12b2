// SPDX-License-Identifier: Apache-2.0
#include "server/describe_device.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "absl/time/clock.h"
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

// What comes until the other end is closed. False: not until then.
bool ReadAll(int fd, absl::Time end, std::string& text) {
  std::array<char, 4096> part;
  while (true) {
    pollfd ready = {fd, POLLIN, 0};
    const int64_t left = absl::ToInt64Milliseconds(end - absl::Now());
    if (left <= 0) return false;
    const int polled =
        poll(&ready, 1, static_cast<int>(std::min<int64_t>(left, 1000)));
    if (polled == 0 || (polled < 0 && errno == EINTR)) continue;
    const ssize_t n = read(fd, part.data(), part.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return true;
    if (text.size() < kLimit) text.append(part.data(), static_cast<size_t>(n));
  }
}

// False: it has not ended by then. One that a driver holds cannot even be
// killed, and is left behind.
bool Await(pid_t pid, absl::Time end, int& wait_status) {
  while (true) {
    const pid_t ended = waitpid(pid, &wait_status, WNOHANG);
    if (ended == pid || (ended < 0 && errno != EINTR)) return true;
    if (absl::Now() >= end) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
}

absl::StatusOr<Output> RunProgram(const std::string& program,
                                  const std::string& argument,
                                  const std::string& second,
                                  absl::Duration timeout) {
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
  bool ended = false;
  if (failure == 0) {
    const absl::Time end = absl::Now() + timeout;
    ended = ReadAll(pipe_ends[0], end, output.text) &&
            Await(pid, end, output.wait_status);
    if (!ended) {
      kill(pid, SIGKILL);
      Await(pid, absl::Now() + absl::Seconds(1), output.wait_status);
    }
  }
  close(pipe_ends[0]);
  if (failure != 0) return absl::ErrnoToStatus(failure, program);
  if (!ended) {
    return absl::DeadlineExceededError(
        "it did not answer within " + absl::FormatDuration(timeout) +
        ": its driver or a GPU may hang (the kernel log tells of Xid errors); "
        "it said: " +
        output.text);
  }
  return output;
}

}  // namespace

absl::StatusOr<std::string> DescribeDevice(const std::string& rank_binary,
                                           const std::string& device,
                                           absl::Duration timeout) {
  if (device == "cpu") return NewCpuKernels()->description();
  if (device != "cuda") {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "DEVICE_UNKNOWN")
        .With("field", "device")
        .With("value", device)
        .Message("--device is \"" + device + "\"; use cpu or cuda");
  }
  const auto output =
      RunProgram(rank_binary, "--describe", "--device=cuda", timeout);
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
