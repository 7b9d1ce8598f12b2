// SPDX-License-Identifier: Apache-2.0
// Receives a streamed batch: checks every datum as it comes, and the whole
// against its commit record.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status.h"
#include "server/decode_datum.h"
#include "server/job.h"
#include "server/operation.h"
#include "server/payload_digest.h"
#include "server/services.h"

namespace gradwire {

// The job of a handle that can take this operation, and its limits.
// Errors: those of Job::CheckSubmit.
struct Target {
  JobPtr job;
  RequestLimits limits;
};
absl::StatusOr<Target> FindTarget(const ServiceContext& context,
                                  const std::string& model_id, int64_t seq,
                                  v1::OperationKind kind);

// Whether a refusal is the last word on a request. If so its number ends with
// it, so that what is pipelined behind does not wait; else the number stays
// open for the request to come again.
bool IsFinalRefusal(const absl::Status& status);

class DatumUpload {
 public:
  // REQUIRES: CheckLossSpec(loss) is OK.
  DatumUpload(LossSpec loss, const RequestLimits& request_limits,
              const ServiceLimits& service_limits)
      : loss_(std::move(loss)),
        request_limits_(request_limits),
        service_limits_(service_limits) {}

  // Errors: those of DecodeDatum; RESOURCE_EXHAUSTED BATCH_TOO_LARGE.
  absl::Status Add(v1::DatumChunk chunk);
  // Errors: INVALID_ARGUMENT EMPTY_BATCH, COMMIT_MISMATCH.
  absl::Status Commit(const v1::CommitRecord& commit);
  // Moves a batch out of the header that it has come with. False if there is
  // none. Errors: those of Add and Commit; INVALID_ARGUMENT MISSING_COMMIT.
  template <typename Header>
  absl::StatusOr<bool> TakeFrom(Header& header);

  // After Commit: datums, counts and the payload's digest.
  OperationRequest TakeRequest();
  std::vector<DatumShape> TakeShapes() { return std::move(shapes_); }

 private:
  const LossSpec loss_;
  const RequestLimits request_limits_;
  const ServiceLimits service_limits_;
  OperationRequest request_;
  std::vector<DatumShape> shapes_;
  PayloadDigest digest_;
};

class GradientUpload {
 public:
  GradientUpload(std::vector<DatumShape> shapes,
                 const ServiceLimits& service_limits)
      : shapes_(std::move(shapes)),
        seen_(shapes_.size()),
        service_limits_(service_limits) {}

  // Errors: those of DecodeGradient; INVALID_ARGUMENT DATUM_INDEX_INVALID (out
  // of range or twice); RESOURCE_EXHAUSTED BATCH_TOO_LARGE.
  absl::Status Add(v1::GradientChunk chunk);
  // Errors: INVALID_ARGUMENT COMMIT_MISMATCH.
  absl::Status Commit(const v1::CommitRecord& commit);
  OperationRequest TakeRequest();

 private:
  const std::vector<DatumShape> shapes_;
  std::vector<bool> seen_;
  const ServiceLimits service_limits_;
  OperationRequest request_;
  PayloadDigest digest_;
};

// INVALID_ARGUMENT MISSING_COMMIT: the stream ended without its last message.
absl::Status CommitMissing();

template <typename Header>
absl::StatusOr<bool> DatumUpload::TakeFrom(Header& header) {
  if (!header.has_datums() && !header.has_datums_commit()) return false;
  if (!header.has_datums_commit()) return CommitMissing();
  GW_RETURN_IF_ERROR(Add(std::move(*header.mutable_datums())));
  GW_RETURN_IF_ERROR(Commit(header.datums_commit()));
  header.clear_datums();
  header.clear_datums_commit();
  return true;
}

// Tells requests apart: kind, the header's fields, the payload's digest.
std::string RequestDigest(v1::OperationKind kind,
                          const google::protobuf::Message& header,
                          const std::string& payload_digest);

}  // namespace gradwire
