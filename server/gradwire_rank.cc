// SPDX-License-Identifier: Apache-2.0
// A rank: dials its supervisor, loads the model, executes commands. It ends
// with its stream.
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <string>
#include <thread>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/synchronization/mutex.h"
#include "base/log.h"
#include "device/cpu_device.h"
#include "gradwire/v1/rank.grpc.pb.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nlohmann/json.hpp"
#include "server/default_precision.h"
#include "server/rank_worker.h"
#include "server/version.h"

ABSL_FLAG(std::string, supervisor, "",
          "where the supervisor listens: unix:...");
ABSL_FLAG(std::string, job_id, "", "the job this rank is of");
ABSL_FLAG(int, threads, 0, "CPU threads; 0 = one for each core");
ABSL_FLAG(bool, describe, false,
          "print as JSON what a job would compute with here, and end");

namespace gradwire {
namespace {

// Received and not yet executed.
class Commands {
 public:
  void Push(v1::RankCommand command) {
    absl::MutexLock lock(&mu_);
    queue_.push_back(std::move(command));
    changed_.Signal();
  }
  v1::RankCommand Pop() {
    absl::MutexLock lock(&mu_);
    while (queue_.empty()) changed_.Wait(&mu_);
    v1::RankCommand command = std::move(queue_.front());
    queue_.pop_front();
    return command;
  }

 private:
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::deque<v1::RankCommand> queue_;
};

// For `gradwire doctor`.
void Describe() {
  const std::string device = NewCpuKernels()->description();
  const PrecisionChoice choice = ChoosePrecision("", device);
  const nlohmann::ordered_json description = {
      {"version", kVersion},
      {"device", device},
      {"isa", InstructionSet(device)},
      {"threads", CpuDevice(absl::GetFlag(FLAGS_threads)).pool().num_threads()},
      {"default_precision", PrecisionName(choice.precision)},
      {"default_precision_reason", choice.reason},
  };
  std::printf("%s\n", description.dump().c_str());
}

int Main() {
  if (absl::GetFlag(FLAGS_describe)) {
    Describe();
    return 0;
  }
  const char* token = std::getenv("GRADWIRE_JOIN_TOKEN");
  if (token == nullptr || absl::GetFlag(FLAGS_supervisor).empty()) {
    spdlog::error(
        "gradwire_rank is started by gradwired, which gives it an address and "
        "a token");
    return 2;
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  auto channel =
      grpc::CreateCustomChannel(absl::GetFlag(FLAGS_supervisor),
                                grpc::InsecureChannelCredentials(), arguments);
  auto stub = v1::RankService::NewStub(channel);
  grpc::ClientContext context;
  auto stream = stub->Connect(&context);
  v1::RankEvent hello;
  hello.mutable_hello()->set_job_id(absl::GetFlag(FLAGS_job_id));
  hello.mutable_hello()->set_pid(getpid());
  hello.mutable_hello()->set_join_token(token);
  unsetenv("GRADWIRE_JOIN_TOKEN");
  stream->Write(hello);

  Commands commands;
  std::thread reader([&] {
    v1::RankCommand command;
    while (stream->Read(&command)) commands.Push(std::move(command));
    // Without a supervisor there is nobody to work for, whatever the worker is
    // in the middle of.
    spdlog::info("the supervisor's stream has ended");
    _exit(0);
  });
  RankWorker worker(absl::GetFlag(FLAGS_threads),
                    [&](const v1::RankEvent& e) { stream->Write(e); });
  while (worker.Execute(commands.Pop())) {
  }
  // The load has failed and was reported; the supervisor ends the stream.
  stream->WritesDone();
  reader.join();
  return 0;
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("one rank of a gradwire job");
  absl::ParseCommandLine(argc, argv);
  gradwire::InitLog("gradwire_rank");
  return gradwire::Main();
}
