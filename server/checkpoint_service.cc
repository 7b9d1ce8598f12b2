// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <compare>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "base/error.h"
#include "base/status.h"
#include "server/grpc_status.h"
#include "server/names.h"
#include "server/services.h"

namespace gradwire {
namespace {

constexpr int kMostRows = 200, kUsualRows = 50;
constexpr size_t kPartBytes = size_t{1} << 20;

// By age. That of a checkpoint changes when another one takes its name, and
// then it has another place.
struct Place {
  int64_t micros = 0;
  std::string path;
  auto operator<=>(const Place&) const = default;
};

Place PlaceOf(const v1::Checkpoint& row) {
  return {row.create_time().seconds() * 1'000'000 +
              row.create_time().nanos() / 1000,
          row.path()};
}

std::string TokenOf(const Place& place) {
  return std::to_string(place.micros) + ":" + place.path;
}

std::optional<Place> PlaceOf(const std::string& token) {
  Place place;
  const size_t colon = token.find(':');
  if (colon == std::string::npos ||
      !absl::SimpleAtoi(token.substr(0, colon), &place.micros)) {
    return std::nullopt;
  }
  place.path = token.substr(colon + 1);
  return place;
}

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

absl::Status NoStore() {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "OBJECT_STORE_MISSING")
      .Server()
      .Message(
          "This server has no object store. Start it with --object_store, or "
          "leave out what asks for one.");
}

}  // namespace

absl::StatusOr<std::vector<v1::Checkpoint>> CheckpointServiceImpl::Rows(
    const v1::ListCheckpointsRequest& request) const {
  GW_ASSIGN_OR_RETURN(std::vector<v1::Checkpoint> rows,
                      catalogue().List(request.job_id()));
  RemoteStore* const remote = context_.remote;
  if (remote == nullptr) {
    if (request.remote()) return NoStore();
    return rows;
  }
  std::set<std::string> known;
  for (v1::Checkpoint& row : rows) {
    known.insert(row.path());
    if (auto ref = ParseCatalogueRef(row.path(), "path"); ref.ok()) {
      remote->Fill(*ref, row);
    }
  }
  if (!request.remote()) return rows;
  GW_ASSIGN_OR_RETURN(std::vector<v1::Checkpoint> there,
                      remote->List(request.job_id()));
  for (v1::Checkpoint& row : there) {
    if (known.count(row.path()) == 0) rows.push_back(std::move(row));
  }
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) {
    return PlaceOf(a) < PlaceOf(b);
  });
  return rows;
}

absl::StatusOr<v1::Checkpoint> CheckpointServiceImpl::Get(
    const CheckpointRef& ref) const {
  auto row = catalogue().Get(ref);
  RemoteStore* const remote = context_.remote;
  if (remote == nullptr) return row;
  if (row.ok()) remote->Fill(ref, *row);
  if (!absl::IsNotFound(row.status())) return row;
  auto there = remote->Get(ref);
  // Of neither, the disk's answer.
  return absl::IsNotFound(there.status()) ? row : there;
}

absl::StatusOr<v1::Checkpoint> CheckpointServiceImpl::Delete(
    const CheckpointRef& ref) const {
  RemoteStore* const remote = context_.remote;
  if (remote == nullptr) return catalogue().Delete(ref);
  return remote->Delete(ref);
}

absl::StatusOr<v1::Checkpoint> CheckpointServiceImpl::Fetch(
    const CheckpointRef& ref) const {
  if (context_.remote == nullptr) return NoStore();
  GW_RETURN_IF_ERROR(context_.remote->Fetch(ref));
  return Get(ref);
}

absl::StatusOr<v1::Checkpoint> CheckpointServiceImpl::SetTtl(
    const v1::SetCheckpointTtlRequest& request) const {
  GW_ASSIGN_OR_RETURN(const CheckpointRef ref,
                      ParseCatalogueRef(request.path(), "path"));
  GW_RETURN_IF_ERROR(CheckTtl(request.ttl_seconds()));
  GW_ASSIGN_OR_RETURN(v1::Checkpoint row,
                      catalogue().SetTtl(ref, request.ttl_seconds()));
  if (context_.remote != nullptr) context_.remote->Fill(ref, row);
  return row;
}

absl::StatusOr<v1::ListCheckpointsResponse> CheckpointServiceImpl::List(
    const v1::ListCheckpointsRequest& request) const {
  GW_RETURN_IF_ERROR(CheckList(request));
  if (!request.job_id().empty() && !request.remote() &&
      !catalogue().KnowsJob(request.job_id())) {
    // It may have saved nothing yet.
    GW_RETURN_IF_ERROR(context_.jobs->Get(request.job_id()).status());
  }
  GW_ASSIGN_OR_RETURN(const std::vector<v1::Checkpoint> rows, Rows(request));
  auto next = rows.begin();
  if (!request.page_token().empty()) {
    // Of the last row of the page before, which may have gone since.
    const std::optional<Place> last = PlaceOf(request.page_token());
    if (!last.has_value()) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "PAGE_TOKEN_INVALID")
          .With("field", "page_token")
          .With("value", request.page_token().substr(0, 256))
          .Message(
              "page_token must come from the previous page; leave it out to "
              "begin again.");
    }
    next = std::find_if(rows.begin(), rows.end(),
                        [&](const auto& row) { return *last < PlaceOf(row); });
  }
  const int size = request.page_size() == 0 ? kUsualRows : request.page_size();
  v1::ListCheckpointsResponse reply;
  for (; next != rows.end(); ++next) {
    if (reply.checkpoints_size() == size) {
      reply.set_next_page_token(TokenOf(PlaceOf(reply.checkpoints(size - 1))));
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
                                           const Call& call,
                                           v1::Checkpoint* reply) {
  auto ref = ParseCatalogueRef(request.path(), "path");
  if (!ref.ok()) return ToGrpcStatus(ref.status());
  auto row = call(*ref);
  if (!row.ok()) return ToGrpcStatus(row.status());
  *reply = *std::move(row);
  return grpc::Status::OK;
}

grpc::Status CheckpointServiceImpl::GetCheckpoint(
    grpc::ServerContext*, const v1::CheckpointRequest* request,
    v1::Checkpoint* reply) {
  return Answer(
      *request, [this](const auto& ref) { return Get(ref); }, reply);
}

grpc::Status CheckpointServiceImpl::VerifyCheckpoint(
    grpc::ServerContext*, const v1::CheckpointRequest* request,
    v1::Checkpoint* reply) {
  return Answer(
      *request, [this](const auto& ref) { return catalogue().Verify(ref); },
      reply);
}

grpc::Status CheckpointServiceImpl::DeleteCheckpoint(
    grpc::ServerContext*, const v1::CheckpointRequest* request,
    v1::Checkpoint* reply) {
  return Answer(
      *request, [this](const auto& ref) { return Delete(ref); }, reply);
}

grpc::Status CheckpointServiceImpl::SetCheckpointTtl(
    grpc::ServerContext*, const v1::SetCheckpointTtlRequest* request,
    v1::Checkpoint* reply) {
  auto row = SetTtl(*request);
  if (!row.ok()) return ToGrpcStatus(row.status());
  *reply = *std::move(row);
  return grpc::Status::OK;
}

grpc::Status CheckpointServiceImpl::FetchCheckpoint(
    grpc::ServerContext*, const v1::CheckpointRequest* request,
    v1::Checkpoint* reply) {
  return Answer(
      *request, [this](const auto& ref) { return Fetch(ref); }, reply);
}

grpc::Status CheckpointServiceImpl::PromoteCheckpoint(
    grpc::ServerContext*, const v1::PromoteCheckpointRequest* request,
    v1::PromotedModel* reply) {
  auto ref = ParseCatalogueRef(request->path(), "path");
  if (!ref.ok()) return ToGrpcStatus(ref.status());
  auto model = catalogue().Promote(*ref, request->model_id(),
                                   context_.environment->snapshot_shard_bytes);
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
