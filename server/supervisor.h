// SPDX-License-Identifier: Apache-2.0
// The whole server: tables, services, listeners.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "checkpoint/remote/s3_object_store.h"
#include "checkpoint/safetensors.h"
#include "server/collector.h"
#include "server/health.h"
#include "server/job_table.h"
#include "server/metrics.h"
#include "server/ops_http.h"
#include "server/rank_tls.h"
#include "server/remote_store.h"
#include "server/rpc_metrics.h"
#include "server/services.h"
#include "server/session_table.h"
#include "server/state_dir.h"

namespace gradwire {

struct SupervisorOptions {
  std::string state_dir;
  std::string listen = "127.0.0.1:7700";
  std::string metrics_listen = "127.0.0.1:9700";
  std::string port_file;
  std::string rank_binary;
  // As in RankGroupOptions.
  std::string device = "cpu";
  int threads = 0;
  double gap_timeout_seconds = 600;
  double result_retention_seconds = 3600;
  int64_t max_queued_ops = 64;
  // As in JobEnvironment.
  int max_recoveries = 10;
  int64_t auto_checkpoint_steps = 100;
  double max_replay_seconds = 300;
  double rank_timeout_seconds = 30;
  double collective_timeout_seconds = 120;
  // How often what has expired is deleted.
  double collect_seconds = 60;
  // As in JobEnvironment.
  int64_t snapshot_shard_bytes = kShardBytes;
  // "local", or "external": ranks come by themselves, with the token, to
  // rank_listen.
  std::string launch = "local";
  std::string rank_listen;
  std::string join_token_file;
  RankTls rank_tls;
  // No url: no object store.
  S3Options object_store;
  // Let its endpoint be http:// of another machine.
  bool object_store_insecure = false;
};

class Supervisor {
 public:
  // Serves when it returns. Errors: those of StateDir, PortFile and OpsHttp;
  // those of Metadata and OpenS3; OBJECT_STORE_REFUSED; PORT_TAKEN;
  // ADDRESS_NOT_LOOPBACK; OPTION_OUT_OF_RANGE; LAUNCH_INVALID; those of
  // ReadJoinToken and RankServerCredentials.
  static absl::StatusOr<std::unique_ptr<Supervisor>> Start(
      const SupervisorOptions& options);
  // No new work; what runs may end within `drain`; then everything stops.
  void Stop(absl::Duration drain);

  // Whether there are jobs that the next server goes on with.
  bool HasJobs() const;

  const std::string& address() const { return address_; }
  const std::string& device() const { return context_.device; }
  const std::string& metrics_address() const { return metrics_->address(); }
  // Where ranks dial; empty unless they come by themselves.
  const std::string& rank_address() const { return rank_address_; }

 private:
  Supervisor() = default;
  absl::Status StartRemoteStore(const SupervisorOptions& options);
  absl::Status StartRankListener();
  absl::Status StartExternalRankListener(const SupervisorOptions& options);
  absl::Status StartPublicListener(const std::string& listen);

  std::unique_ptr<StateDir> state_dir_;
  std::unique_ptr<Metadata> metadata_;
  std::unique_ptr<FileSystem> files_;  // with this server's epoch
  std::unique_ptr<SpaceReserve> reserve_;
  Metrics registry_;
  // Jobs tell it of what they save.
  std::unique_ptr<RemoteStore> remote_;
  std::unique_ptr<Collector> collector_;
  SessionTable sessions_;
  JobEnvironment environment_;
  HealthService health_;
  JobTable jobs_{&environment_};
  ServiceContext context_;
  JobServiceImpl job_service_{&context_};
  CheckpointServiceImpl checkpoint_service_{&context_};
  SessionServiceImpl session_service_{&context_};
  OperationServiceImpl operation_service_{&context_};
  TrainingServiceImpl training_service_{&context_};
  RankServiceImpl rank_service_{&context_};
  RankServiceImpl external_rank_service_{&context_};
  std::unique_ptr<OpsHttp> metrics_;
  std::unique_ptr<grpc::Server> rank_server_;
  std::unique_ptr<grpc::Server> external_rank_server_;
  std::unique_ptr<grpc::Server> public_server_;
  std::unique_ptr<PortFile> port_file_;
  std::string address_;
  std::string rank_address_;
  std::atomic<bool> serving_{false};
};

}  // namespace gradwire
