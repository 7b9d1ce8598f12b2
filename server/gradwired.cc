// SPDX-License-Identifier: Apache-2.0
// The supervisor's process: flags, signals, exit codes.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "base/error.h"
#include "base/log.h"
#include "checkpoint/safetensors.h"
#include "server/supervisor.h"
#include "server/version.h"

ABSL_FLAG(std::string, state_dir, "",
          "directory for everything the server keeps; default: "
          "$XDG_STATE_HOME/gradwire or ~/.local/state/gradwire");
ABSL_FLAG(std::string, listen, "127.0.0.1:7700",
          "HOST:PORT of the gRPC API; port 0 takes a free one");
ABSL_FLAG(std::string, metrics_listen, "127.0.0.1:9700",
          "HOST:PORT of /metrics, /livez and /readyz; port 0 takes a free one");
ABSL_FLAG(std::string, port_file, "",
          "file that tells the addresses once the server accepts requests");
ABSL_FLAG(std::string, launch, "local",
          "how ranks are started: local (by this server), or external (by a "
          "cluster's scheduler; see docs/sharding.md)");
ABSL_FLAG(std::string, rank_listen, "",
          "with --launch=external, HOST:PORT where ranks dial; port 0 takes a "
          "free one");
ABSL_FLAG(std::string, join_token_file, "",
          "with --launch=external, file with the secret that ranks must know, "
          "at least 32 characters");
ABSL_FLAG(std::string, rank_tls_cert, "",
          "PEM file: this server's certificate towards ranks");
ABSL_FLAG(std::string, rank_tls_key, "", "PEM file: its private key");
ABSL_FLAG(std::string, rank_tls_ca, "",
          "PEM file: the authority that signs ranks' certificates");
ABSL_FLAG(bool, rank_insecure, false,
          "let ranks come over a network without TLS");
ABSL_FLAG(std::string, device, "cpu",
          "what ranks that are started here compute with: cpu, or cuda, each "
          "rank of a job its own GPU");
ABSL_FLAG(int, threads, 0,
          "CPU threads of each rank; 0: an equal share of the cores");
ABSL_FLAG(double, collect_seconds, 60,
          "how often checkpoints and snapshots that have expired are deleted");
ABSL_FLAG(int64_t, snapshot_shard_bytes, gradwire::kShardBytes,
          "most tensor data of one file of a base snapshot or a promoted "
          "model; what is larger is in several, with an index");
ABSL_FLAG(std::string, rank_binary, "",
          "the rank's program; default: gradwire_rank beside this one, or "
          "gradwire_rank_cuda with --device=cuda");
ABSL_FLAG(double, rank_timeout_seconds, 30,
          "how long a rank may give no sign of life");
ABSL_FLAG(double, collective_timeout_seconds, 120,
          "how long ranks may wait for each other in one collective");
ABSL_FLAG(double, drain_seconds, 10,
          "how long running operations may take after SIGTERM");
ABSL_FLAG(double, gap_timeout_seconds, 600,
          "how long operations wait for a missing seq_id");
ABSL_FLAG(double, result_retention_seconds, 3600,
          "how long results can be fetched");
ABSL_FLAG(int, max_recoveries, 10,
          "failures of ranks in a row, with no operation executed between "
          "them, after which a job fails; until then its ranks start again "
          "and its state is rebuilt. 0: it fails with the first");
ABSL_FLAG(int64_t, auto_checkpoint_steps, 100,
          "optimizer steps after which a checkpoint for recovery is written");
ABSL_FLAG(double, max_replay_seconds, 300,
          "a checkpoint for recovery is written once recovery without it would "
          "repeat so many seconds of computing");
ABSL_FLAG(std::string, object_store, "",
          "s3://bucket or s3://bucket/prefix, where checkpoints and snapshots "
          "are copied to; keys are AWS_ACCESS_KEY_ID and "
          "AWS_SECRET_ACCESS_KEY of the environment");
ABSL_FLAG(std::string, object_store_endpoint, "",
          "https://host[:port] of an S3 API; default: AWS_ENDPOINT_URL, or "
          "AWS's own");
ABSL_FLAG(std::string, object_store_region, "",
          "its region; default: AWS_REGION, or us-east-1");
ABSL_FLAG(std::string, object_store_ca, "",
          "PEM file of authorities for its certificate; default: the system's");
ABSL_FLAG(bool, object_store_insecure, false,
          "let its endpoint be another machine's without TLS");
ABSL_FLAG(int, object_store_part_mib, 16,
          "files larger than this are sent in parts of this size");
ABSL_FLAG(int64_t, max_queued_ops, 64, "operations that wait in one model");

namespace gradwire {
namespace {

constexpr int kBadConfiguration = 2;
constexpr int kStateDirectory = 3;
constexpr int kPortTaken = 4;
// Of a process that SIGTERM has ended, as shells say it.
constexpr int kJobsGoOn = 128 + SIGTERM;

bool parsing = false;

// Abseil ends the process with status 1 for a flag it does not know.
void EndOfParsing() {
  if (!parsing) return;
  std::fflush(nullptr);
  _exit(kBadConfiguration);
}

void ParseFlags(int argc, char** argv) {
  bool help = false;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    help = help || arg.find("-help") != std::string::npos ||
           arg.find("-version") != std::string::npos;
  }
  absl::FlagsUsageConfig config;
  config.contains_help_flags = [](absl::string_view file) {
    return file.find("server/gradwired") != absl::string_view::npos;
  };
  config.version_string = [] {
    return "gradwired " + std::string(kVersion) + "\n";
  };
  absl::SetFlagsUsageConfig(config);
  absl::SetProgramUsageMessage(
      "serves training jobs over gRPC. Every flag can be given in a file "
      "named by --flagfile, one a line.");
  std::atexit(&EndOfParsing);
  parsing = !help;
  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  if (rest.size() > 1) {
    std::fprintf(stderr, "gradwired: %s is no flag\n", rest[1]);
    _exit(kBadConfiguration);
  }
  parsing = false;
}

std::string DefaultStateDir() {
  if (const char* base = std::getenv("XDG_STATE_HOME");
      base != nullptr && *base != '\0') {
    return std::string(base) + "/gradwire";
  }
  const char* home = std::getenv("HOME");
  return std::string(home == nullptr ? "/var/lib" : home) +
         (home == nullptr ? "/gradwire" : "/.local/state/gradwire");
}

int ExitCode(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  const std::string reason = detail ? detail->reason : "";
  for (const char* of_state :
       {"STATE_DIR_LOCKED", "STATE_DIR_UNUSABLE", "STATE_VERSION",
        "EPOCH_FENCED", "METADATA_CORRUPT", "STORAGE_FULL", "STORAGE_IO",
        "SYSTEM_LIMIT"}) {
    if (reason == of_state) return kStateDirectory;
  }
  if (reason == "PORT_TAKEN") return kPortTaken;
  return kBadConfiguration;
}

int Main() {
  SupervisorOptions options;
  options.state_dir = absl::GetFlag(FLAGS_state_dir);
  if (options.state_dir.empty()) options.state_dir = DefaultStateDir();
  options.listen = absl::GetFlag(FLAGS_listen);
  options.metrics_listen = absl::GetFlag(FLAGS_metrics_listen);
  options.port_file = absl::GetFlag(FLAGS_port_file);
  options.device = absl::GetFlag(FLAGS_device);
  options.threads = absl::GetFlag(FLAGS_threads);
  options.gap_timeout_seconds = absl::GetFlag(FLAGS_gap_timeout_seconds);
  options.result_retention_seconds =
      absl::GetFlag(FLAGS_result_retention_seconds);
  options.max_queued_ops = absl::GetFlag(FLAGS_max_queued_ops);
  options.max_recoveries = absl::GetFlag(FLAGS_max_recoveries);
  options.auto_checkpoint_steps = absl::GetFlag(FLAGS_auto_checkpoint_steps);
  options.max_replay_seconds = absl::GetFlag(FLAGS_max_replay_seconds);
  options.rank_timeout_seconds = absl::GetFlag(FLAGS_rank_timeout_seconds);
  options.collective_timeout_seconds =
      absl::GetFlag(FLAGS_collective_timeout_seconds);
  options.collect_seconds = absl::GetFlag(FLAGS_collect_seconds);
  options.snapshot_shard_bytes = absl::GetFlag(FLAGS_snapshot_shard_bytes);
  options.rank_binary = absl::GetFlag(FLAGS_rank_binary);
  if (options.rank_binary.empty()) {
    std::error_code ignored;
    options.rank_binary =
        (std::filesystem::read_symlink("/proc/self/exe", ignored)
             .parent_path() /
         (options.device == "cuda" ? "gradwire_rank_cuda" : "gradwire_rank"))
            .string();
  }
  options.launch = absl::GetFlag(FLAGS_launch);
  options.rank_listen = absl::GetFlag(FLAGS_rank_listen);
  options.join_token_file = absl::GetFlag(FLAGS_join_token_file);
  options.rank_tls.cert = absl::GetFlag(FLAGS_rank_tls_cert);
  options.rank_tls.key = absl::GetFlag(FLAGS_rank_tls_key);
  options.rank_tls.ca = absl::GetFlag(FLAGS_rank_tls_ca);
  options.rank_tls.insecure = absl::GetFlag(FLAGS_rank_insecure);
  options.object_store.url = absl::GetFlag(FLAGS_object_store);
  options.object_store.endpoint = absl::GetFlag(FLAGS_object_store_endpoint);
  options.object_store.region = absl::GetFlag(FLAGS_object_store_region);
  options.object_store.ca_file = absl::GetFlag(FLAGS_object_store_ca);
  options.object_store_insecure = absl::GetFlag(FLAGS_object_store_insecure);
  FillFromEnvironment(options.object_store);
  const int part_mib = absl::GetFlag(FLAGS_object_store_part_mib);
  // S3's own limits.
  if (part_mib < 5 || part_mib > 5120) {
    spdlog::error("--object_store_part_mib must be from 5 to 5120");
    return kBadConfiguration;
  }
  options.object_store.part_bytes = int64_t{part_mib} << 20;
  const double drain = absl::GetFlag(FLAGS_drain_seconds);
  if (!(drain >= 0 && drain <= 86400)) {
    spdlog::error("--drain_seconds must be from 0 to 86400");
    return kBadConfiguration;
  }

  // Before the first thread, so that all inherit it and sigwait gets them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  auto server = Supervisor::Start(options);
  if (!server.ok()) {
    spdlog::error("{}", std::string(server.status().message()));
    return ExitCode(server.status());
  }
  spdlog::info("gradwired {} serves on {}, metrics on {}, state in {}, {}",
               kVersion, (*server)->address(), (*server)->metrics_address(),
               options.state_dir, (*server)->device());
  if (!(*server)->rank_address().empty()) {
    spdlog::info("ranks dial {}", (*server)->rank_address());
  }
  int received = 0;
  do {
    sigwait(&signals, &received);
  } while (received == SIGHUP);
  spdlog::info("signal {}: stopping", received);
  // Preempted, as far as whoever started it can tell.
  const bool goes_on = received == SIGTERM && (*server)->HasJobs();
  (*server)->Stop(absl::Seconds(drain));
  spdlog::info("stopped");
  return goes_on ? kJobsGoOn : 0;
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  gradwire::ParseFlags(argc, argv);
  gradwire::InitLog("gradwired");
  return gradwire::Main();
}
