// SPDX-License-Identifier: Apache-2.0
#include "server/grpc_status.h"
#include "server/services.h"
#include "server/version.h"

namespace gradwire {
namespace {

constexpr double kHeartbeatSeconds = 10;
constexpr double kSessionTimeoutSeconds = 300;

double Seconds(std::chrono::milliseconds value) {
  return std::chrono::duration<double>(value).count();
}

}  // namespace

void SessionServiceImpl::Fill(v1::ClientConfig* config) const {
  const OpQueue::Limits& queue = context_.environment->queue;
  config->set_max_message_bytes(context_.limits.max_message_bytes);
  config->set_max_batch_bytes(context_.limits.max_batch_bytes);
  config->set_max_batch_datums(context_.limits.max_batch_datums);
  config->set_heartbeat_interval_seconds(kHeartbeatSeconds);
  config->set_session_timeout_seconds(kSessionTimeoutSeconds);
  config->set_max_queued_ops(static_cast<int32_t>(queue.max_ops));
  config->set_max_queued_bytes(queue.max_bytes);
  config->set_result_retention_seconds(
      Seconds(context_.environment->result_retention));
  config->set_gap_timeout_seconds(Seconds(queue.gap_timeout));
  config->set_max_wait_seconds(context_.limits.max_wait_seconds);
  config->set_server_version(kVersion);
}

grpc::Status SessionServiceImpl::GetClientConfig(
    grpc::ServerContext*, const v1::GetClientConfigRequest*,
    v1::ClientConfig* reply) {
  Fill(reply);
  return grpc::Status::OK;
}

grpc::Status SessionServiceImpl::CreateSession(
    grpc::ServerContext*, const v1::CreateSessionRequest*,
    v1::CreateSessionResponse* reply) {
  auto created = context_.sessions->Create();
  if (!created.ok()) return ToGrpcStatus(created.status());
  reply->set_session_id(*created);
  Fill(reply->mutable_config());
  return grpc::Status::OK;
}

grpc::Status SessionServiceImpl::Heartbeat(grpc::ServerContext*,
                                           const v1::HeartbeatRequest* request,
                                           v1::HeartbeatResponse*) {
  return ToGrpcStatus(context_.sessions->Heartbeat(request->session_id()));
}

grpc::Status SessionServiceImpl::FinishSession(
    grpc::ServerContext*, const v1::FinishSessionRequest* request,
    v1::FinishSessionResponse*) {
  return ToGrpcStatus(context_.sessions->Finish(request->session_id()));
}

}  // namespace gradwire
