// SPDX-License-Identifier: Apache-2.0
// Errors that a client can see: a gRPC code, a machine-readable reason and
// every dynamic value as metadata. They travel as absl::Status with one
// payload, so that layers below the server need no protobuf; the server turns
// the payload into google.rpc.ErrorInfo. The registry of reasons is
// docs/errors.md.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"

namespace gradwire {

enum class ErrorCategory { kUser, kServer };

struct ErrorDetail {
  std::string reason;  // [A-Z0-9_]+
  ErrorCategory category = ErrorCategory::kUser;
  // Well-known keys: datum_index, field, position, value, limit.
  std::map<std::string, std::string> metadata;
};

// Makes a status that carries `detail`. `message` says what is wrong, where,
// the limit, and what to do; it holds no paths, addresses or other clients'
// names.
//   return ErrorBuilder(absl::StatusCode::kInvalidArgument, "SHAPE_MISMATCH")
//       .With("field", "weights").With("value", 3).With("limit", 4)
//       .Message("weights has 3 entries but model_input has 4 tokens; ...");
class ErrorBuilder {
 public:
  ErrorBuilder(absl::StatusCode code, std::string reason) : code_(code) {
    detail_.reason = std::move(reason);
  }

  ErrorBuilder& With(const std::string& key, const std::string& value);
  ErrorBuilder& With(const std::string& key, const char* value);
  ErrorBuilder& With(const std::string& key, int64_t value);
  ErrorBuilder& With(const std::string& key, int value);
  ErrorBuilder& With(const std::string& key, double value);
  // The failure is not the caller's.
  ErrorBuilder& Server();

  absl::Status Message(const std::string& message) const;

 private:
  absl::StatusCode code_;
  ErrorDetail detail_;
};

// The detail that ErrorBuilder attached, or nullopt for any other status.
std::optional<ErrorDetail> GetErrorDetail(const absl::Status& status);

// `status` with `key` added to its detail (a status without detail is returned
// unchanged). Used to add datum_index on the way up.
absl::Status WithErrorMetadata(const absl::Status& status,
                               const std::string& key,
                               const std::string& value);

// A status that is not OK as bytes, detail included, and back: between
// processes of one build. Bytes that are none become an INTERNAL error.
std::string StatusToBytes(const absl::Status& status);
absl::Status StatusFromBytes(const std::string& bytes);

}  // namespace gradwire
