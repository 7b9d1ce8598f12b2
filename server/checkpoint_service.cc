// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "server/grpc_status.h"
#include "server/names.h"
#include "server/services.h"

namespace gradwire {
namespace {

constexpr int kMostRows = 200, kUsualRows = 50;
constexpr size_t kPartBytes = size_t{1} << 20;

absl::Status CheckList(const v1::ListCheckpointsRequest& request) {
  if (request.page_size() < 0 || request.page_size() > kMostRows) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                        "OPTION_OUT_OF_RANGE")
        .With("field", "page_size")
        .With("value", request.page_size())
        .With("limit", kMostRows)
        .Message("page_size must be 0 to 200.");
  }
  return request.job_id().empty() ? absl::OkStatus()
                                  : CheckJobId(request.job_id());
}

}  // namespace

absl::StatusOr<v1::ListCheckpointsResponse> CheckpointServiceImpl::List(
    const v1::ListCheckpointsRequest& request) const {
  GW_RETURN_IF_ERROR(CheckList(request));
  if (!request.job_id().empty() && !catalogue().KnowsJob(request.job_id())) {
    // It may have saved nothing yet.
    GW_RETURN_IF_ERROR(context_.jobs->Get(request.job_id()).status());
  }
  GW_ASSIGN_OR_RETURN(const std::vector<v1::Checkpoint> rows,
                      catalogue().List(request.job_id()));
  auto next = rows.begin();
  if (!request.page_token().empty()) {
    // The last row of the page before; rows never change their order.
    next = std::find_if(rows.begin(), rows.end(), [&](const auto& row) {
      return row.path() == request.page_token();
    });
    if (next == rows.end()) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "PAGE_TOKEN_INVALID")
          .With("field", "page_token")
          .With("value", request.page_token().substr(0, 256))
          .Message(
              "page_token must come from the previous page, whose last "
              "checkpoint must still be there; begin again.");
    }
    ++next;
  }
  const int size = request.page_size() == 0 ? kUsualRows : request.page_size();
  v1::ListCheckpointsResponse reply;
  for (; next != rows.end(); ++next) {
    if (reply.checkpoints_size() == size) {
      reply.set_next_page_token(reply.checkpoints(size - 1).path());
      break;
    }
    *reply.add_checkpoints() = *next;
  }
  return reply;
}

grpc::Status CheckpointServiceImpl::ListCheckpoints(
    grpc::ServerContext*, const v1::ListCheckpointsRequest* request,
    v1::ListCheckpointsResponse* reply) {
  auto listed = List(*request);
  if (!listed.ok()) return ToGrpcStatus(listed.status());
  *reply = *std::move(listed);
  return grpc::Status::OK;
}

grpc::Status CheckpointServiceImpl::Answer(const v1::CheckpointRequest& request,
                                           Call call, v1::Checkpoint* reply) {
  auto ref = ParseCatalogueRef(request.path(), "path");
  if (!ref.ok()) return ToGrpcStatus(ref.status());
  auto row = (catalogue().*call)(*ref);
  if (!row.ok()) return ToGrpcStatus(row.status());
  *reply = *std::move(row);
  return grpc::Status::OK;
}

grpc::Status CheckpointServiceImpl::GetCheckpoint(
    grpc::ServerContext*, const v1::CheckpointRequest* request,
    v1::Checkpoint* reply) {
  return Answer(*request, &CheckpointCatalogue::Get, reply);
}

grpc::Status CheckpointServiceImpl::VerifyCheckpoint(
    grpc::ServerContext*, const v1::CheckpointRequest* request,
    v1::Checkpoint* reply) {
  return Answer(*request, &CheckpointCatalogue::Verify, reply);
}

grpc::Status CheckpointServiceImpl::DeleteCheckpoint(
    grpc::ServerContext*, const v1::CheckpointRequest* request,
    v1::Checkpoint* reply) {
  return Answer(*request, &CheckpointCatalogue::Delete, reply);
}

grpc::Status CheckpointServiceImpl::PromoteCheckpoint(
    grpc::ServerContext*, const v1::PromoteCheckpointRequest* request,
    v1::PromotedModel* reply) {
  auto ref = ParseCatalogueRef(request->path(), "path");
  if (!ref.ok()) return ToGrpcStatus(ref.status());
  auto model = catalogue().Promote(*ref, request->model_id());
  if (!model.ok()) return ToGrpcStatus(model.status());
  *reply = *std::move(model);
  return grpc::Status::OK;
}

grpc::Status CheckpointServiceImpl::DiffCheckpoints(
    grpc::ServerContext*, const v1::DiffCheckpointsRequest* request,
    v1::CheckpointDiff* reply) {
  auto from = ParseCatalogueRef(request->from(), "from");
  auto to = ParseCatalogueRef(request->to(), "to");
  if (!from.ok()) return ToGrpcStatus(from.status());
  if (!to.ok()) return ToGrpcStatus(to.status());
  auto diff = catalogue().Diff(*from, *to);
  if (!diff.ok()) return ToGrpcStatus(diff.status());
  *reply = *std::move(diff);
  return grpc::Status::OK;
}

grpc::Status CheckpointServiceImpl::ExportDiff(
    grpc::ServerContext*, const v1::ExportDiffRequest* request,
    grpc::ServerWriter<v1::FilePart>* writer) {
  auto from = ParseCatalogueRef(request->from(), "from");
  auto to = ParseCatalogueRef(request->to(), "to");
  if (!from.ok()) return ToGrpcStatus(from.status());
  if (!to.ok()) return ToGrpcStatus(to.status());
  if (!v1::DiffFormat_IsValid(request->format())) {
    return ToGrpcStatus(
        ErrorBuilder(absl::StatusCode::kUnimplemented, "UNSUPPORTED_OPTION")
            .With("field", "format")
            .With("value", request->format())
            .With("limit", "dlt1, xor, sparse")
            .Message("This server knows the formats dlt1, xor and sparse."));
  }
  const auto file = catalogue().ExportDiff(*from, *to, request->format());
  if (!file.ok()) return ToGrpcStatus(file.status());
  v1::FilePart part;
  part.set_total_bytes(std::ssize(*file));
  for (size_t at = 0; at < file->size(); at += kPartBytes) {
    part.set_data(file->substr(at, kPartBytes));
    // False: the client has gone, and gRPC says so.
    if (!writer->Write(part)) break;
    part.clear_total_bytes();
  }
  return grpc::Status::OK;
}

}  // namespace gradwire
