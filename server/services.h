// SPDX-License-Identifier: Apache-2.0
// The public API and the ranks' own, as gRPC services over the tables.
#pragma once

#include <grpcpp/grpcpp.h>

#include "gradwire/v1/checkpoints.grpc.pb.h"
#include "gradwire/v1/jobs.grpc.pb.h"
#include "gradwire/v1/operations.grpc.pb.h"
#include "gradwire/v1/rank.grpc.pb.h"
#include "gradwire/v1/sessions.grpc.pb.h"
#include "gradwire/v1/training.grpc.pb.h"
#include "server/checkpoint_catalogue.h"
#include "server/job_table.h"
#include "server/remote_store.h"
#include "server/session_table.h"

namespace gradwire {

// Limits that clients are told and held to.
struct ServiceLimits {
  int64_t max_message_bytes = int64_t{64} << 20;
  int64_t max_batch_bytes = int64_t{1} << 30;
  int64_t max_batch_datums = 100000;
  double max_wait_seconds = 30;
};

struct ServiceContext {
  JobTable* jobs = nullptr;
  SessionTable* sessions = nullptr;
  JobEnvironment* environment = nullptr;
  RemoteStore* remote = nullptr;  // null: the server has no object store
  ServiceLimits limits;
  Clock::time_point started = Clock::now();
  std::string metrics_address;
  // What ranks compute on, with its instruction set.
  std::string device;
  std::string launch = "local";
};

class JobServiceImpl final : public v1::JobService::Service {
 public:
  explicit JobServiceImpl(ServiceContext* context) : context_(*context) {}
  grpc::Status GetServerInfo(grpc::ServerContext* call,
                             const v1::GetServerInfoRequest* request,
                             v1::ServerInfo* reply) override;
  grpc::Status CreateJob(grpc::ServerContext* call,
                         const v1::CreateJobRequest* request,
                         v1::Job* reply) override;
  grpc::Status GetJob(grpc::ServerContext* call,
                      const v1::GetJobRequest* request,
                      v1::Job* reply) override;
  grpc::Status ListJobs(grpc::ServerContext* call,
                        const v1::ListJobsRequest* request,
                        v1::ListJobsResponse* reply) override;
  grpc::Status WatchJob(grpc::ServerContext* call,
                        const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::Job>* writer) override;
  grpc::Status DeleteJob(grpc::ServerContext* call,
                         const v1::DeleteJobRequest* request,
                         v1::Job* reply) override;
  grpc::Status RestartJob(grpc::ServerContext* call,
                          const v1::RestartJobRequest* request,
                          v1::Job* reply) override;
  grpc::Status GetProfile(grpc::ServerContext* call,
                          const v1::GetProfileRequest* request,
                          v1::Profile* reply) override;

 private:
  ServiceContext& context_;
};

class CheckpointServiceImpl final : public v1::CheckpointService::Service {
 public:
  explicit CheckpointServiceImpl(ServiceContext* context)
      : context_(*context) {}
  grpc::Status ListCheckpoints(grpc::ServerContext* call,
                               const v1::ListCheckpointsRequest* request,
                               v1::ListCheckpointsResponse* reply) override;
  grpc::Status GetCheckpoint(grpc::ServerContext* call,
                             const v1::CheckpointRequest* request,
                             v1::Checkpoint* reply) override;
  grpc::Status VerifyCheckpoint(grpc::ServerContext* call,
                                const v1::CheckpointRequest* request,
                                v1::Checkpoint* reply) override;
  grpc::Status DeleteCheckpoint(grpc::ServerContext* call,
                                const v1::CheckpointRequest* request,
                                v1::Checkpoint* reply) override;
  grpc::Status SetCheckpointTtl(grpc::ServerContext* call,
                                const v1::SetCheckpointTtlRequest* request,
                                v1::Checkpoint* reply) override;
  grpc::Status FetchCheckpoint(grpc::ServerContext* call,
                               const v1::CheckpointRequest* request,
                               v1::Checkpoint* reply) override;
  grpc::Status PromoteCheckpoint(grpc::ServerContext* call,
                                 const v1::PromoteCheckpointRequest* request,
                                 v1::PromotedModel* reply) override;
  grpc::Status DiffCheckpoints(grpc::ServerContext* call,
                               const v1::DiffCheckpointsRequest* request,
                               v1::CheckpointDiff* reply) override;
  grpc::Status ExportDiff(grpc::ServerContext* call,
                          const v1::ExportDiffRequest* request,
                          grpc::ServerWriter<v1::FilePart>* writer) override;

 private:
  using Call =
      std::function<absl::StatusOr<v1::Checkpoint>(const CheckpointRef& ref)>;

  absl::StatusOr<std::vector<v1::Checkpoint>> Rows(
      const v1::ListCheckpointsRequest& request) const;
  absl::StatusOr<v1::ListCheckpointsResponse> List(
      const v1::ListCheckpointsRequest& request) const;
  // Of the disk, or else of the object store.
  absl::StatusOr<v1::Checkpoint> Get(const CheckpointRef& ref) const;
  absl::StatusOr<v1::Checkpoint> Delete(const CheckpointRef& ref) const;
  absl::StatusOr<v1::Checkpoint> Fetch(const CheckpointRef& ref) const;
  absl::StatusOr<v1::Checkpoint> SetTtl(
      const v1::SetCheckpointTtlRequest& request) const;
  static grpc::Status Answer(const v1::CheckpointRequest& request,
                             const Call& call, v1::Checkpoint* reply);

  CheckpointCatalogue catalogue() const {
    return context_.environment->catalogue();
  }

  ServiceContext& context_;
};

class SessionServiceImpl final : public v1::SessionService::Service {
 public:
  explicit SessionServiceImpl(ServiceContext* context) : context_(*context) {}
  grpc::Status GetClientConfig(grpc::ServerContext* call,
                               const v1::GetClientConfigRequest* request,
                               v1::ClientConfig* reply) override;
  grpc::Status CreateSession(grpc::ServerContext* call,
                             const v1::CreateSessionRequest* request,
                             v1::CreateSessionResponse* reply) override;
  grpc::Status Heartbeat(grpc::ServerContext* call,
                         const v1::HeartbeatRequest* request,
                         v1::HeartbeatResponse* reply) override;
  grpc::Status FinishSession(grpc::ServerContext* call,
                             const v1::FinishSessionRequest* request,
                             v1::FinishSessionResponse* reply) override;

 private:
  void Fill(v1::ClientConfig* config) const;
  ServiceContext& context_;
};

class OperationServiceImpl final : public v1::OperationService::Service {
 public:
  explicit OperationServiceImpl(ServiceContext* context) : context_(*context) {}
  grpc::Status GetOperation(grpc::ServerContext* call,
                            const v1::GetOperationRequest* request,
                            v1::Operation* reply) override;
  grpc::Status WaitOperation(grpc::ServerContext* call,
                             const v1::WaitOperationRequest* request,
                             v1::Operation* reply) override;
  grpc::Status WatchOperations(
      grpc::ServerContext* call, const v1::WatchOperationsRequest* request,
      grpc::ServerWriter<v1::OperationEvent>* writer) override;
  grpc::Status FetchResult(
      grpc::ServerContext* call, const v1::FetchResultRequest* request,
      grpc::ServerWriter<v1::FetchResultResponse>* writer) override;
  grpc::Status CancelOperation(grpc::ServerContext* call,
                               const v1::CancelOperationRequest* request,
                               v1::Operation* reply) override;
  grpc::Status AcknowledgeOperation(
      grpc::ServerContext* call, const v1::AcknowledgeOperationRequest* request,
      v1::AcknowledgeOperationResponse* reply) override;

 private:
  ServiceContext& context_;
};

class TrainingServiceImpl final : public v1::TrainingService::Service {
 public:
  explicit TrainingServiceImpl(ServiceContext* context) : context_(*context) {}
  grpc::Status CreateModel(grpc::ServerContext* call,
                           const v1::CreateModelRequest* request,
                           v1::CreateModelResponse* reply) override;
  grpc::Status GetModelInfo(grpc::ServerContext* call,
                            const v1::GetModelInfoRequest* request,
                            v1::ModelInfo* reply) override;
  grpc::Status UnloadModel(grpc::ServerContext* call,
                           const v1::SequencedRequest* request,
                           v1::OperationRef* reply) override;
  grpc::Status Forward(grpc::ServerContext* call,
                       grpc::ServerReader<v1::ForwardRequest>* reader,
                       v1::OperationRef* reply) override;
  grpc::Status ForwardBackward(
      grpc::ServerContext* call,
      grpc::ServerReader<v1::ForwardBackwardRequest>* reader,
      v1::OperationRef* reply) override;
  grpc::Status Backward(grpc::ServerContext* call,
                        grpc::ServerReader<v1::BackwardRequest>* reader,
                        v1::OperationRef* reply) override;
  grpc::Status ReleaseActivations(grpc::ServerContext* call,
                                  const v1::ReleaseActivationsRequest* request,
                                  v1::OperationRef* reply) override;
  grpc::Status ZeroGrad(grpc::ServerContext* call,
                        const v1::SequencedRequest* request,
                        v1::OperationRef* reply) override;
  grpc::Status OptimStep(grpc::ServerContext* call,
                         const v1::OptimStepRequest* request,
                         v1::OperationRef* reply) override;
  grpc::Status SaveState(grpc::ServerContext* call,
                         const v1::SaveStateRequest* request,
                         v1::OperationRef* reply) override;
  grpc::Status LoadState(grpc::ServerContext* call,
                         const v1::LoadStateRequest* request,
                         v1::OperationRef* reply) override;
  grpc::Status SaveSnapshot(grpc::ServerContext* call,
                            const v1::SaveSnapshotRequest* request,
                            v1::OperationRef* reply) override;
  grpc::Status ForwardBackwardCustom(
      grpc::ServerContext* call,
      grpc::ServerReaderWriter<v1::CustomResponse, v1::CustomRequest>* stream)
      override;

 private:
  // What is in the object store alone comes back to the disk.
  // Makes `init_from.ref` a path, and brings what it names to the disk.
  absl::Status ResolveInit(const Job& job, v1::CreateModelRequest& request);
  absl::Status FetchState(const v1::LoadStateRequest& request,
                          const CheckpointRef& ref);
  ServiceContext& context_;
};

class RankServiceImpl final : public v1::RankService::Service {
 public:
  explicit RankServiceImpl(ServiceContext* context) : context_(*context) {}
  grpc::Status Connect(grpc::ServerContext* call,
                       grpc::ServerReaderWriter<v1::RankCommand, v1::RankEvent>*
                           stream) override;

 private:
  absl::Status Serve(
      grpc::ServerContext* call,
      grpc::ServerReaderWriter<v1::RankCommand, v1::RankEvent>* stream);

  ServiceContext& context_;
};

}  // namespace gradwire
