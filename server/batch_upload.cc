// SPDX-License-Identifier: Apache-2.0
#include "server/batch_upload.h"

#include <set>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"

namespace gradwire {
namespace {

absl::Status TooLarge(const std::string& field, int64_t value, int64_t limit) {
  return ErrorBuilder(absl::StatusCode::kResourceExhausted, "BATCH_TOO_LARGE")
      .With("field", field)
      .With("value", value)
      .With("limit", limit)
      .Message("The batch is above the server's limit of " +
               std::to_string(limit) + " " + field +
               ". Split it over several calls: gradients add up.");
}

}  // namespace

absl::StatusOr<Target> FindTarget(const ServiceContext& context,
                                  const std::string& model_id, int64_t seq,
                                  v1::OperationKind kind) {
  Target target;
  GW_ASSIGN_OR_RETURN(target.job, context.jobs->OfModel(model_id));
  GW_RETURN_IF_ERROR(target.job->CheckSubmit(model_id, seq, kind));
  const v1::Profile profile = target.job->LastProfile();
  target.limits.vocab = profile.vocab_size();
  target.limits.max_context = profile.max_context_length();
  target.limits.max_top_k = profile.max_top_k();
  return target;
}

bool IsFinalRefusal(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  if (!detail || detail->category != ErrorCategory::kUser) return false;
  static const auto* const open = new std::set<std::string>{
      "ACTIVATIONS_EXPIRED", "CANCELLED",           "COMMIT_MISMATCH",
      "HANDLE_FENCED",       "HEADER_MISSING",      "JOB_DELETED",
      "MESSAGE_UNEXPECTED",  "MISSING_COMMIT",      "MODEL_NOT_FOUND",
      "MODEL_UNLOADED",      "OPERATION_CANCELLED", "SEQUENCE_CLOSED",
      "SEQ_INVALID",         "SEQ_REUSED"};
  return open->count(detail->reason) == 0;
}

absl::Status DatumUpload::Add(v1::DatumChunk chunk) {
  request_.bytes += static_cast<int64_t>(chunk.ByteSizeLong());
  if (request_.bytes > service_limits_.max_batch_bytes) {
    return TooLarge("bytes", request_.bytes, service_limits_.max_batch_bytes);
  }
  for (const v1::Datum& datum : chunk.datums()) {
    if (request_.datum_count >= service_limits_.max_batch_datums) {
      return TooLarge("datums", request_.datum_count + 1,
                      service_limits_.max_batch_datums);
    }
    GW_ASSIGN_OR_RETURN(
        TrainDatum decoded,
        DecodeDatum(datum, request_.datum_count, loss_, request_limits_));
    ++request_.datum_count;
    const auto n = static_cast<int64_t>(decoded.tokens.size());
    request_.tokens += n;
    shapes_.push_back({n, decoded.k});
    digest_.Add(datum);
  }
  request_.datums.push_back(std::move(chunk));
  return absl::OkStatus();
}

absl::Status DatumUpload::Commit(const v1::CommitRecord& commit) {
  GW_RETURN_IF_ERROR(digest_.Check(commit));
  if (request_.datum_count == 0) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "EMPTY_BATCH")
        .With("field", "datums")
        .With("value", 0)
        .With("limit", 1)
        .Message("The batch has no datum; send at least one.");
  }
  request_.digest = commit.xxh3_128();
  return absl::OkStatus();
}

OperationRequest DatumUpload::TakeRequest() { return std::move(request_); }

absl::Status GradientUpload::Add(v1::GradientChunk chunk) {
  request_.bytes += static_cast<int64_t>(chunk.ByteSizeLong());
  if (request_.bytes > service_limits_.max_batch_bytes) {
    return TooLarge("bytes", request_.bytes, service_limits_.max_batch_bytes);
  }
  for (const v1::GradientItem& item : chunk.items()) {
    const int64_t index = item.datum_index();
    const auto count = static_cast<int64_t>(shapes_.size());
    const bool known = index >= 0 && index < count;
    if (!known || seen_[index]) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "DATUM_INDEX_INVALID")
          .With("field", "datum_index")
          .With("value", index)
          .With("limit", count)
          .Message(known ? "A datum's gradient was sent twice."
                         : "There is no such datum in the forward.");
    }
    seen_[index] = true;
    GW_RETURN_IF_ERROR(
        DecodeGradient(item, shapes_[index].n, shapes_[index].k).status());
    digest_.Add(item);
  }
  request_.gradients.push_back(std::move(chunk));
  return absl::OkStatus();
}

absl::Status GradientUpload::Commit(const v1::CommitRecord& commit) {
  GW_RETURN_IF_ERROR(digest_.Check(commit));
  request_.digest = commit.xxh3_128();
  return absl::OkStatus();
}

OperationRequest GradientUpload::TakeRequest() {
  request_.datum_count = static_cast<int64_t>(shapes_.size());
  return std::move(request_);
}

absl::Status CommitMissing() {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "MISSING_COMMIT")
      .With("field", "commit")
      .Message(
          "The stream ended without its commit record, so nothing of it was "
          "taken. Send the whole request again with the same seq_id.");
}

std::string RequestDigest(v1::OperationKind kind,
                          const google::protobuf::Message& header,
                          const std::string& payload_digest) {
  std::string out = std::to_string(kind) + "/";
  {
    google::protobuf::io::StringOutputStream bytes(&out);
    google::protobuf::io::CodedOutputStream coded(&bytes);
    // Maps in one order.
    coded.SetSerializationDeterministic(true);
    header.SerializeToCodedStream(&coded);
  }
  return PayloadDigest::OfBytes(out + "/" + payload_digest);
}

}  // namespace gradwire
