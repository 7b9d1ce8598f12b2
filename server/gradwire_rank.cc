// SPDX-License-Identifier: Apache-2.0
// A rank: dials its supervisor, loads the model, executes commands. It ends
// with its stream.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/status/statusor.h"
#include "base/error.h"
#include "base/log.h"
#include "device/thread_pool.h"
#include "nlohmann/json.hpp"
#include "server/default_precision.h"
#include "server/rank_backend.h"
#include "server/rank_cpus.h"
#include "server/rank_group_join.h"
#include "server/rank_hello.h"
#include "server/rank_link.h"
#include "server/rank_tls.h"
#include "server/rank_worker.h"
#include "server/version.h"

ABSL_FLAG(std::string, supervisor, "",
          "where the supervisor listens: HOST:PORT or unix:...");
ABSL_FLAG(std::string, job_id, "", "the job this rank is of");
ABSL_FLAG(int, rank, 0, "which of the job's ranks this is");
ABSL_FLAG(int, world_size, 1, "how many ranks the job has");
ABSL_FLAG(std::string, device, "cpu",
          "what to compute with: cpu, or cuda:N, the Nth of the GPUs that this "
          "process sees");
ABSL_FLAG(int, threads, 0, "CPU threads; 0 = one for each core");
ABSL_FLAG(
    std::string, join_token_file, "",
    "file with the job's secret; default: what GRADWIRE_JOIN_TOKEN holds");
ABSL_FLAG(double, dial_timeout_seconds, 600,
          "how long to try while the supervisor, or its job, is not there yet");
ABSL_FLAG(std::string, rank_tls_cert, "", "PEM file: this rank's certificate");
ABSL_FLAG(std::string, rank_tls_key, "", "PEM file: its private key");
ABSL_FLAG(std::string, rank_tls_ca, "",
          "PEM file: the authority that signs the supervisor's certificate");
ABSL_FLAG(bool, rank_insecure, false, "dial over a network without TLS");
ABSL_FLAG(std::string, collective_address, "",
          "IP address at which the job's other ranks reach this one; default: "
          "the one from which it reaches the supervisor");
ABSL_FLAG(std::string, cpus, "",
          "CPUs to compute on, such as 0,1,4; default: all");
ABSL_FLAG(bool, describe, false,
          "print as JSON what a job would compute with here, and end");

namespace gradwire {
namespace {

constexpr int kBadConfiguration = 2;

// For `gradwire doctor`, and for the supervisor, which has no kernels of GPUs.
int Describe() {
  const auto backend = MakeRankBackend(absl::GetFlag(FLAGS_device),
                                       absl::GetFlag(FLAGS_threads));
  if (!backend.ok()) {
    spdlog::error("{}", std::string(backend.status().message()));
    return EXIT_FAILURE;
  }
  const std::string device = backend->kernels->description();
  const PrecisionChoice choice = ChoosePrecision("", device);
  nlohmann::ordered_json description = {
      {"version", kVersion},
      {"device", device},
      {"isa", InstructionSet(device)},
  };
  if (const ThreadPool* threads = backend->device->host_threads()) {
    description["threads"] = threads->num_threads();
  }
  description["default_precision"] = PrecisionName(choice.precision);
  description["default_precision_reason"] = choice.reason;
  std::printf("%s\n", description.dump().c_str());
  return EXIT_SUCCESS;
}

absl::StatusOr<std::string> JoinToken() {
  if (absl::GetFlag(FLAGS_supervisor).empty()) {
    return absl::InvalidArgumentError(
        "gradwire_rank needs --supervisor, and is best started by gradwired; "
        "see docs/sharding.md");
  }
  const std::string path = absl::GetFlag(FLAGS_join_token_file);
  if (!path.empty()) return ReadJoinToken(path);
  const char* token = std::getenv("GRADWIRE_JOIN_TOKEN");
  if (token == nullptr) {
    return absl::InvalidArgumentError(
        "a rank needs GRADWIRE_JOIN_TOKEN or --join_token_file");
  }
  const std::string copy = token;
  // Not for everybody who may look at this process.
  unsetenv("GRADWIRE_JOIN_TOKEN");
  return copy;
}

int Main() {
  if (absl::GetFlag(FLAGS_describe)) return Describe();
  const auto token = JoinToken();
  if (!token.ok()) {
    spdlog::error("{}", std::string(token.status().message()));
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
  options.hello.set_join_token(*token);
  options.dial_timeout =
      absl::Seconds(absl::GetFlag(FLAGS_dial_timeout_seconds));
  RankTls tls;
  tls.cert = absl::GetFlag(FLAGS_rank_tls_cert);
  tls.key = absl::GetFlag(FLAGS_rank_tls_key);
  tls.ca = absl::GetFlag(FLAGS_rank_tls_ca);
  tls.insecure = absl::GetFlag(FLAGS_rank_insecure);
  auto credentials = RankChannelCredentials(options.supervisor, tls);
  if (!credentials.ok()) {
    spdlog::error("{}", std::string(credentials.status().message()));
    return kBadConfiguration;
  }
  options.credentials = *credentials;
  auto link = RankLink::Dial(options);
  if (!link.ok()) {
    const auto detail = GetErrorDetail(link.status());
    spdlog::error("rank {} of job {} cannot join: {}{}",
                  absl::GetFlag(FLAGS_rank), absl::GetFlag(FLAGS_job_id),
                  detail ? detail->reason + ": " : "",
                  std::string(link.status().message()));
    return EXIT_FAILURE;
  }
  std::string address = absl::GetFlag(FLAGS_collective_address);
  if (address.empty() && absl::GetFlag(FLAGS_world_size) > 1) {
    auto found = AddressTowards(absl::GetFlag(FLAGS_supervisor));
    if (!found.ok()) {
      spdlog::error("{}", std::string(found.status().message()));
      return kBadConfiguration;
    }
    address = *std::move(found);
  }
  // The first command is to load, and says what the job was given.
  v1::RankCommand command = (*link)->NextCommand();
  RankWorker worker(absl::GetFlag(FLAGS_device),
                    absl::GetFlag(FLAGS_threads) > 0
                        ? absl::GetFlag(FLAGS_threads)
                        : command.load().spec().threads(),
                    address, link->get());
  while (worker.Execute(std::move(command))) command = (*link)->NextCommand();
  // The load has failed and was reported.
  (*link)->AwaitEnd();
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("one rank of a gradwire job");
  absl::ParseCommandLine(argc, argv);
  // A rank has more streams than a GPU has queues unless it is asked:
  // collectives of two groups that share a queue wait for each other's peers.
  if (absl::GetFlag(FLAGS_device).starts_with("cuda")) {
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 0);
  }
  gradwire::InitLog("gradwire_rank");
  return gradwire::Main();
}
