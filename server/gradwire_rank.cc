// SPDX-License-Identifier: Apache-2.0
// A rank: dials its supervisor, loads the model, executes commands. It ends
// with its stream.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "base/log.h"
#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nlohmann/json.hpp"
#include "server/default_precision.h"
#include "server/rank_cpus.h"
#include "server/rank_link.h"
#include "server/rank_worker.h"
#include "server/version.h"

ABSL_FLAG(std::string, supervisor, "",
          "where the supervisor listens: unix:...");
ABSL_FLAG(std::string, job_id, "", "the job this rank is of");
ABSL_FLAG(int, rank, 0, "which of the job's ranks this is");
ABSL_FLAG(int, world_size, 1, "how many ranks the job has");
ABSL_FLAG(int, threads, 0, "CPU threads; 0 = one for each core");
ABSL_FLAG(std::string, cpus, "",
          "CPUs to compute on, such as 0,1,4; default: all");
ABSL_FLAG(bool, describe, false,
          "print as JSON what a job would compute with here, and end");

namespace gradwire {
namespace {

constexpr int kBadConfiguration = 2;

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
    return kBadConfiguration;
  }
  // Before the first thread, for all of them.
  if (absl::Status pinned = PinToCpus(absl::GetFlag(FLAGS_cpus));
      !pinned.ok()) {
    spdlog::error("{}", std::string(pinned.message()));
    return kBadConfiguration;
  }
  RankLinkOptions options;
  options.supervisor = absl::GetFlag(FLAGS_supervisor);
  options.hello.set_job_id(absl::GetFlag(FLAGS_job_id));
  options.hello.set_rank(absl::GetFlag(FLAGS_rank));
  options.hello.set_world_size(absl::GetFlag(FLAGS_world_size));
  options.hello.set_pid(getpid());
  options.hello.set_version(kVersion);
  options.hello.set_join_token(token);
  unsetenv("GRADWIRE_JOIN_TOKEN");
  auto link = RankLink::Dial(options);
  if (!link.ok()) {
    spdlog::error("{}", std::string(link.status().message()));
    return EXIT_FAILURE;
  }
  RankWorker worker(absl::GetFlag(FLAGS_threads), link->get());
  while (worker.Execute((*link)->NextCommand())) {
  }
  // The load has failed and was reported.
  (*link)->AwaitEnd();
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("one rank of a gradwire job");
  absl::ParseCommandLine(argc, argv);
  gradwire::InitLog("gradwire_rank");
  return gradwire::Main();
}
