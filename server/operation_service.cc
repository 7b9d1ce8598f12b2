// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "base/error.h"
#include "server/grpc_status.h"
#include "server/job_errors.h"
#include "server/services.h"

namespace gradwire {
namespace {

// How often a held call looks whether its client is still there.
constexpr absl::Duration kPoll = absl::Milliseconds(500);
constexpr int kChunkBytes = 1 << 20;

bool HasArrays(v1::OperationKind kind) {
  return kind == v1::OPERATION_KIND_FORWARD ||
         kind == v1::OPERATION_KIND_FORWARD_BACKWARD;
}

// The arrays of an operation that is done, if they are there and take at most
// `most` bytes.
void AddArrays(const JobPtr& job, const OperationPtr& op, int64_t most,
               v1::Operation* reply) {
  most = std::min<int64_t>(most, kChunkBytes);
  const v1::CommitRecord commit = job->ItemsCommit(op);
  // Large ones are not brought back from the log for nothing.
  if (!HasArrays(op->kind) || commit.byte_count() > most) return;
  if (!job->LoadItems(op).ok()) return;
  if (job->CopyItems(op, most, reply->mutable_logprobs())) {
    *reply->mutable_logprobs_commit() = commit;
  } else {
    reply->clear_logprobs();
  }
}

}  // namespace

grpc::Status OperationServiceImpl::GetOperation(
    grpc::ServerContext*, const v1::GetOperationRequest* request,
    v1::Operation* reply) {
  const std::string op_id =
      request->op_id().empty()
          ? request->model_id() + "." + std::to_string(request->seq_id())
          : request->op_id();
  auto found = context_.jobs->OfOperation(op_id);
  if (!found.ok()) return ToGrpcStatus(found.status());
  *reply = found->first->Describe(found->second);
  return grpc::Status::OK;
}

grpc::Status OperationServiceImpl::WaitOperation(
    grpc::ServerContext* call, const v1::WaitOperationRequest* request,
    v1::Operation* reply) {
  auto found = context_.jobs->OfOperation(request->op_id());
  if (!found.ok()) return ToGrpcStatus(found.status());
  const double asked = request->timeout_seconds();
  const double seconds =
      asked > 0 ? std::min(asked, context_.limits.max_wait_seconds) : 0;
  const absl::Time deadline = absl::Now() + absl::Seconds(seconds);
  while (true) {
    const absl::Duration left = deadline - absl::Now();
    *reply = found->first->Wait(found->second, std::min(left, kPoll));
    const v1::OperationState state = reply->state();
    if (state == v1::OPERATION_STATE_DONE && request->array_bytes() > 0) {
      AddArrays(found->first, found->second, request->array_bytes(), reply);
    }
    if (found->first->stopping()) {
      // What has ended is told; the rest is in the log, for the next server.
      return reply->has_error() || state == v1::OPERATION_STATE_DONE
                 ? grpc::Status::OK
                 : ToGrpcStatus(ServerStopping());
    }
    if (state == v1::OPERATION_STATE_DONE ||
        state == v1::OPERATION_STATE_FAILED ||
        state == v1::OPERATION_STATE_CANCELLED || left <= kPoll ||
        call->IsCancelled()) {
      return grpc::Status::OK;
    }
  }
}

grpc::Status OperationServiceImpl::WatchOperations(
    grpc::ServerContext* call, const v1::WatchOperationsRequest* request,
    grpc::ServerWriter<v1::OperationEvent>* writer) {
  int64_t cursor = request->from_cursor();
  while (!call->IsCancelled()) {
    auto events = context_.sessions->Read(request->session_id(), cursor, kPoll);
    if (!events.ok()) return ToGrpcStatus(events.status());
    for (const v1::OperationEvent& event : *events) {
      if (!writer->Write(event)) return grpc::Status::OK;
      cursor = event.cursor();
    }
  }
  return grpc::Status::OK;
}

grpc::Status OperationServiceImpl::FetchResult(
    grpc::ServerContext* call, const v1::FetchResultRequest* request,
    grpc::ServerWriter<v1::FetchResultResponse>* writer) {
  auto found = context_.jobs->OfOperation(request->op_id());
  if (!found.ok()) return ToGrpcStatus(found.status());
  const auto& [job, op] = *found;
  if (!HasArrays(op->kind)) {
    return ToGrpcStatus(
        ErrorBuilder(absl::StatusCode::kInvalidArgument, "RESULT_HAS_NO_ARRAYS")
            .With("field", "op_id")
            .With("value", KindName(op->kind))
            .With("limit", "forward, forward_backward")
            .Message("Only forward and forward_backward have arrays; "
                     "GetOperation gives this result."));
  }
  if (absl::Status loaded = job->LoadItems(op); !loaded.ok()) {
    return ToGrpcStatus(loaded);
  }
  size_t sent = 0;
  while (!call->IsCancelled()) {
    const Job::Items items = job->ReadItems(op, sent, kPoll);
    if (items.expired) {
      return ToGrpcStatus(
          ErrorBuilder(absl::StatusCode::kFailedPrecondition, "RESULT_EXPIRED")
              .With("field", "op_id")
              .With("value", op->op_id)
              .Message("The arrays were acknowledged or have been kept for "
                       "their time, and are gone. The operation is not run "
                       "again; send a forward for the logprobs."));
    }
    v1::FetchResultResponse message;
    size_t bytes = 0;
    for (const v1::LogprobItem& item : items.items) {
      *message.mutable_chunk()->add_items() = item;
      bytes += item.ByteSizeLong();
      if (bytes < kChunkBytes) continue;
      if (!writer->Write(message)) return grpc::Status::OK;
      message.Clear();
      bytes = 0;
    }
    if (bytes > 0 && !writer->Write(message)) return grpc::Status::OK;
    sent += items.items.size();
    if (!items.final && job->stopping()) return ToGrpcStatus(ServerStopping());
    if (!items.final) continue;
    const v1::Operation done = job->Describe(op);
    if (done.state() != v1::OPERATION_STATE_DONE) {
      return ToGrpcStatus(FromOperationError(done.error()));
    }
    message.Clear();
    *message.mutable_commit() = job->ItemsCommit(op);
    writer->Write(message);
    return grpc::Status::OK;
  }
  return grpc::Status::CANCELLED;
}

grpc::Status OperationServiceImpl::CancelOperation(
    grpc::ServerContext*, const v1::CancelOperationRequest* request,
    v1::Operation* reply) {
  auto found = context_.jobs->OfOperation(request->op_id());
  if (!found.ok()) return ToGrpcStatus(found.status());
  *reply = found->first->Cancel(found->second);
  return grpc::Status::OK;
}

grpc::Status OperationServiceImpl::AcknowledgeOperation(
    grpc::ServerContext*, const v1::AcknowledgeOperationRequest* request,
    v1::AcknowledgeOperationResponse*) {
  for (const std::string& op_id : request->op_ids()) {
    auto found = context_.jobs->OfOperation(op_id);
    if (!found.ok()) return ToGrpcStatus(found.status());
    found->first->Acknowledge(found->second);
  }
  return grpc::Status::OK;
}

}  // namespace gradwire
