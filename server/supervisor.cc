// SPDX-License-Identifier: Apache-2.0
#include "server/supervisor.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/resource_quota.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "checkpoint/fence.h"
#include "server/describe_device.h"
#include "server/host_port.h"
#include "server/rank_hello.h"

namespace gradwire {
namespace {

constexpr int kMaxThreads = 4096;
// The logprobs of one datum of 128k tokens, with 64 alternatives each, and
// some.
constexpr int kMaxRankMessage = 256 << 20;
constexpr const char* kServices[] = {"",
                                     "gradwire.v1.CheckpointService",
                                     "gradwire.v1.JobService",
                                     "gradwire.v1.OperationService",
                                     "gradwire.v1.SessionService",
                                     "gradwire.v1.TrainingService"};

absl::Status CheckLoopback(const std::string& flag,
                           const std::string& address) {
  GW_ASSIGN_OR_RETURN(HostPort where, ParseHostPort(address));
  if (IsLoopback(where.host)) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "ADDRESS_NOT_LOOPBACK")
      .With("field", flag)
      .With("value", address)
      .Message("--" + flag + "=" + address +
               " can be reached from other machines, and this server has "
               "neither TLS nor authentication. Listen on 127.0.0.1 and reach "
               "it through an SSH tunnel.");
}

absl::Status LaunchMismatch(const std::string& flag,
                            const std::string& message) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "LAUNCH_INVALID")
      .With("field", flag)
      .Message(message);
}

// What belongs to one way of starting ranks is refused with the other.
absl::Status CheckLaunch(const SupervisorOptions& options) {
  if (options.launch != "local" && options.launch != "external") {
    return LaunchMismatch("launch", "--launch=" + options.launch +
                                        " is unknown; use local or external.");
  }
  const bool external = options.launch == "external";
  const std::pair<const char*, bool> given[] = {
      {"rank_listen", !options.rank_listen.empty()},
      {"join_token_file", !options.join_token_file.empty()}};
  for (const auto& [flag, is_given] : given) {
    if (is_given == external) continue;
    return LaunchMismatch(
        flag, external ? "--launch=external needs --" + std::string(flag) + "."
                       : "--" + std::string(flag) +
                             " is for --launch=external alone.");
  }
  return absl::OkStatus();
}

std::chrono::milliseconds Millis(double seconds) {
  return std::chrono::milliseconds(std::llround(seconds * 1000));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Supervisor>> Supervisor::Start(
    const SupervisorOptions& options) {
  // Ranks beat once a second.
  constexpr double kLeastTimeout = 2;
  // More than any disk has.
  constexpr double kMostShardBytes = 1e15;
  struct Number {
    const char* flag;
    double value, least, most = 1e7;
  };
  const Number numbers[] = {
      {"threads", static_cast<double>(options.threads), 0},
      {"gap_timeout_seconds", options.gap_timeout_seconds, 0},
      {"result_retention_seconds", options.result_retention_seconds, 0},
      {"max_queued_ops", static_cast<double>(options.max_queued_ops), 0},
      {"max_recoveries", static_cast<double>(options.max_recoveries), 0},
      {"auto_checkpoint_steps",
       static_cast<double>(options.auto_checkpoint_steps), 1},
      {"max_replay_seconds", options.max_replay_seconds, 0},
      {"rank_timeout_seconds", options.rank_timeout_seconds, kLeastTimeout},
      {"collective_timeout_seconds", options.collective_timeout_seconds, 1},
      {"collect_seconds", options.collect_seconds, 0.01},
      {"snapshot_shard_bytes",
       static_cast<double>(options.snapshot_shard_bytes), 1, kMostShardBytes}};
  for (const auto& [flag, value, least, most] : numbers) {
    if (value >= least && value <= most) continue;
    return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                        "OPTION_OUT_OF_RANGE")
        .With("field", flag)
        .With("value", value)
        .With("limit", value < least ? least : most)
        .Message(absl::StrCat("--", flag, " is out of range: it must be from ",
                              least, " to ", most, "."));
  }
  GW_RETURN_IF_ERROR(CheckLoopback("listen", options.listen));
  GW_RETURN_IF_ERROR(CheckLoopback("metrics_listen", options.metrics_listen));
  GW_RETURN_IF_ERROR(CheckLaunch(options));

  std::unique_ptr<Supervisor> server(new Supervisor);
  GW_ASSIGN_OR_RETURN(server->state_dir_, StateDir::Open(options.state_dir));
  const std::string epochs = server->state_dir_->epochs();
  GW_ASSIGN_OR_RETURN(const int64_t seen,
                      HighestEpoch(PosixFileSystem(), epochs));
  GW_ASSIGN_OR_RETURN(server->metadata_,
                      Metadata::Open(server->state_dir_->metadata(), seen));
  // From here on no earlier server changes anything, be it as it may with the
  // lock; then comes what it has left.
  const int64_t epoch = server->metadata_->epoch();
  GW_RETURN_IF_ERROR(RaiseEpoch(PosixFileSystem(), epochs, epoch));
  server->files_ = FencedFileSystem(PosixFileSystem(), epochs, epoch);
  GW_RETURN_IF_ERROR(server->state_dir_->RemoveLeftovers(*server->files_));
  GW_RETURN_IF_ERROR(server->state_dir_->PlaceSocket(epoch));
  GW_RETURN_IF_ERROR(server->sessions_.Restore(server->metadata_.get()));
  JobEnvironment& environment = server->environment_;
  environment.metadata = server->metadata_.get();
  environment.files = server->files_.get();
  environment.epoch_directory = epochs;
  server->reserve_ = std::make_unique<SpaceReserve>(
      *server->files_, server->state_dir_->reserve());
  environment.reserve = server->reserve_.get();
  if (const absl::Status held = environment.reserve->Hold(); !held.ok()) {
    spdlog::warn("no space is kept on the disk: {}",
                 std::string(held.message()));
  }
  environment.max_recoveries = options.max_recoveries;
  environment.auto_checkpoint_steps = options.auto_checkpoint_steps;
  environment.max_replay_seconds = options.max_replay_seconds;
  environment.sessions = &server->sessions_;
  server->registry_.SetDevice(options.device);
  environment.metrics = &server->registry_;
  environment.rank_binary = options.rank_binary;
  environment.device = options.device;
  environment.rank_address = "unix:" + server->state_dir_->socket();
  environment.threads = options.threads;
  environment.rank_timeout = absl::Seconds(options.rank_timeout_seconds);
  environment.collective_timeout =
      absl::Seconds(options.collective_timeout_seconds);
  environment.external = options.launch == "external";
  if (environment.external) {
    GW_ASSIGN_OR_RETURN(environment.join_token,
                        ReadJoinToken(options.join_token_file));
  }
  server->context_.launch = options.launch;
  environment.jobs_directory = server->state_dir_->jobs();
  environment.snapshot_shard_bytes = options.snapshot_shard_bytes;
  environment.queue.max_ops = options.max_queued_ops;
  environment.queue.gap_timeout = Millis(options.gap_timeout_seconds);
  environment.result_retention = Millis(options.result_retention_seconds);
  environment.on_change = [health = &server->health_](const v1::Job& job) {
    const std::string name = "gradwire.v1.TrainingService/job/" + job.job_id();
    if (job.state() == v1::JOB_STATE_DELETED) {
      health->Remove(name);
    } else {
      health->Set(name, job.ready());
    }
  };
  GW_ASSIGN_OR_RETURN(server->context_.device,
                      DescribeDevice(options.rank_binary, options.device));
  server->context_.jobs = &server->jobs_;
  server->context_.sessions = &server->sessions_;
  server->context_.environment = &environment;

  GW_ASSIGN_OR_RETURN(
      server->metrics_,
      OpsHttp::Start(options.metrics_listen,
                     {[s = server.get()]() -> std::vector<std::string> {
                        if (s->environment_.draining) return {"draining"};
                        if (!s->serving_) return {"starting"};
                        return {};
                      },
                      [s = server.get()] { return s->registry_.Scrape(); }}));
  server->context_.metrics_address = server->metrics_->address();
  GW_RETURN_IF_ERROR(server->StartRankListener());
  if (environment.external) {
    GW_RETURN_IF_ERROR(server->StartExternalRankListener(options));
  }
  if (!options.object_store.url.empty()) {
    GW_RETURN_IF_ERROR(server->StartRemoteStore(options));
  }
  // Before the first client, who may ask for one of them.
  GW_RETURN_IF_ERROR(server->jobs_.Restore());
  GW_RETURN_IF_ERROR(server->StartPublicListener(options.listen));
  server->collector_ = std::make_unique<Collector>(
      environment.catalogue(), absl::Seconds(options.collect_seconds),
      [remote = server->remote_.get(), reserve = environment.reserve](
          const CheckpointRef& ref, const std::string& digest) {
        if (remote == nullptr) return absl::OkStatus();
        absl::Status noted = remote->WillRemove(ref, digest);
        // What goes makes more space than that.
        if (absl::IsResourceExhausted(noted) && reserve->Release()) {
          noted = remote->WillRemove(ref, digest);
        }
        return noted;
      },
      [remote =
           server->remote_.get()](const CheckpointCatalogue::Deleted& deleted) {
        if (remote == nullptr) return;
        remote->RemoveLater(deleted.ref, deleted.digest);
      });
  for (const char* service : kServices) server->health_.Set(service, true);
  server->serving_ = true;
  if (!options.port_file.empty()) {
    GW_ASSIGN_OR_RETURN(
        server->port_file_,
        PortFile::Write(options.port_file, server->address_,
                        server->metrics_->address(), server->rank_address_));
  }
  return server;
}

absl::Status Supervisor::StartRemoteStore(const SupervisorOptions& options) {
  constexpr std::string_view kHttp = "http://";
  const std::string& endpoint = options.object_store.endpoint;
  if (endpoint.starts_with(kHttp) && !options.object_store_insecure) {
    const std::string rest = endpoint.substr(kHttp.size());
    GW_ASSIGN_OR_RETURN(
        const HostPort where,
        ParseHostPort(rest.find(':') == std::string::npos ? rest + ":80"
                                                          : rest));
    if (!IsLoopback(where.host)) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "OBJECT_STORE_INVALID")
          .With("field", "object_store_endpoint")
          .With("value", endpoint)
          .Message("--object_store_endpoint=" + endpoint +
                   " would carry weights over a network without TLS. Use "
                   "https://, or allow it with --object_store_insecure.");
    }
  }
  GW_ASSIGN_OR_RETURN(auto store, OpenS3(options.object_store));
  // What is wrong with the flags is said now; what is away may come.
  S3Options once = options.object_store;
  once.tries = 1;
  GW_ASSIGN_OR_RETURN(auto probe, OpenS3(once));
  if (const absl::Status there = probe->Check(); absl::IsUnavailable(there)) {
    spdlog::warn("{}: {}", probe->url(), std::string(there.message()));
  } else {
    GW_RETURN_IF_ERROR(there);
  }
  remote_ =
      std::make_unique<RemoteStore>(std::move(store), environment_.catalogue(),
                                    *files_, metadata_.get(), &registry_);
  environment_.on_saved = [remote = remote_.get()](const CheckpointRef& ref) {
    remote->Saved(ref);
  };
  context_.remote = remote_.get();
  return absl::OkStatus();
}

absl::Status Supervisor::StartRankListener() {
  grpc::ServerBuilder builder;
  builder.AddListeningPort(environment_.rank_address,
                           grpc::InsecureServerCredentials());
  builder.RegisterService(&rank_service_);
  builder.SetMaxReceiveMessageSize(-1);
  builder.SetMaxSendMessageSize(-1);
  rank_server_ = builder.BuildAndStart();
  if (rank_server_ != nullptr) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "STATE_DIR_UNUSABLE")
      .Server()
      .Message(
          "The ranks' socket cannot be made in the state directory. Give "
          "another --state_dir.");
}

absl::Status Supervisor::StartExternalRankListener(
    const SupervisorOptions& options) {
  GW_ASSIGN_OR_RETURN(
      std::shared_ptr<grpc::ServerCredentials> credentials,
      RankServerCredentials(options.rank_listen, options.rank_tls));
  GW_ASSIGN_OR_RETURN(HostPort where, ParseHostPort(options.rank_listen));
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(options.rank_listen, credentials, &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Ranks notice by pings that this machine is gone, and this one by their
  // heartbeats.
  builder.AddChannelArgument(
      GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder.SetMaxReceiveMessageSize(kMaxRankMessage);
  builder.SetMaxSendMessageSize(-1);
  grpc::ResourceQuota quota("gradwire-ranks");
  quota.SetMaxThreads(kMaxThreads);
  builder.SetResourceQuota(quota);
  builder.RegisterService(&external_rank_service_);
  external_rank_server_ = builder.BuildAndStart();
  if (external_rank_server_ == nullptr || port == 0) {
    return ErrorBuilder(absl::StatusCode::kUnavailable, "PORT_TAKEN")
        .With("value", options.rank_listen)
        .Message("Cannot listen for ranks on " + options.rank_listen +
                 ": the port is taken or not this machine's, or the "
                 "certificate does not fit its key.");
  }
  rank_address_ = where.host + ":" + std::to_string(port);
  return absl::OkStatus();
}

absl::Status Supervisor::StartPublicListener(const std::string& listen) {
  GW_ASSIGN_OR_RETURN(HostPort where, ParseHostPort(listen));
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::EnableDefaultHealthCheckService(false);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(listen, grpc::InsecureServerCredentials(), &port);
  // Two servers on one port would share its clients at random.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.SetMaxReceiveMessageSize(
      static_cast<int>(context_.limits.max_message_bytes));
  builder.SetMaxSendMessageSize(-1);
  // A client that has stopped answering is given up within 40 s, so that what
  // its streams hold is released.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  grpc::ResourceQuota quota("gradwire");
  quota.SetMaxThreads(kMaxThreads);
  builder.SetResourceQuota(quota);
  std::vector<
      std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>>
      interceptors;
  interceptors.push_back(std::make_unique<RpcMetricsFactory>(&registry_));
  builder.experimental().SetInterceptorCreators(std::move(interceptors));
  builder.RegisterService(&checkpoint_service_);
  builder.RegisterService(&job_service_);
  builder.RegisterService(&session_service_);
  builder.RegisterService(&operation_service_);
  builder.RegisterService(&training_service_);
  builder.RegisterService(&health_);
  public_server_ = builder.BuildAndStart();
  if (public_server_ == nullptr || port == 0) {
    return ErrorBuilder(absl::StatusCode::kUnavailable, "PORT_TAKEN")
        .With("value", listen)
        .Message("Cannot listen on " + listen +
                 ": the port is taken, or not this machine's.");
  }
  address_ = where.host + ":" + std::to_string(port);
  return absl::OkStatus();
}

bool Supervisor::HasJobs() const {
  const std::vector<JobPtr> jobs = jobs_.List();
  return std::any_of(jobs.begin(), jobs.end(), [](const JobPtr& job) {
    const v1::JobState state = job->Get().state();
    return state != v1::JOB_STATE_FAILED && state != v1::JOB_STATE_DELETING &&
           state != v1::JOB_STATE_DELETED;
  });
}

void Supervisor::Stop(absl::Duration drain) {
  health_.Shutdown();
  environment_.draining = true;
  const absl::Time deadline = absl::Now() + drain;
  const auto busy = [&] {
    for (const JobPtr& job : jobs_.List()) {
      if (job->busy()) return true;
    }
    return false;
  };
  while (busy() && absl::Now() < deadline)
    absl::SleepFor(absl::Milliseconds(20));
  // Waiting calls are answered with what has become of their operations.
  for (const JobPtr& job : jobs_.List()) job->Stop();
  // Requests may wait for it.
  if (remote_ != nullptr) remote_->End();
  const auto grace = std::chrono::system_clock::now() + std::chrono::seconds(2);
  public_server_->Shutdown(grace);
  rank_server_->Shutdown(grace);
  if (external_rank_server_ != nullptr) external_rank_server_->Shutdown(grace);
  collector_.reset();
  port_file_.reset();
  metrics_.reset();
}

}  // namespace gradwire
