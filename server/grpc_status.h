// SPDX-License-Identifier: Apache-2.0
// Errors on the wire: one google.rpc.ErrorInfo (domain "gradwire") on every
// failed call, the same content in every failed operation.
#pragma once

#include <grpcpp/grpcpp.h>

#include "absl/status/status.h"
#include "gradwire/v1/operations.pb.h"

namespace gradwire {

// The details carry reason, all metadata and "category"; and a RetryInfo where
// the metadata have retry_after_seconds (1 s where QUEUE_FULL or UNAVAILABLE
// have none). A status without detail takes its code's name for a reason, and
// the server for its cause.
grpc::Status ToGrpcStatus(const absl::Status& status);

// What ToGrpcStatus was given; of any other status, code and message.
absl::Status FromGrpcStatus(const grpc::Status& status);

v1::OperationError ToOperationError(const absl::Status& status);
// Never OK: a code that is no failure becomes UNKNOWN.
absl::Status FromOperationError(const v1::OperationError& error);

// `text` as valid UTF-8 of at most `limit` bytes: what is not becomes '?'.
std::string ValidText(const std::string& text, size_t limit);

}  // namespace gradwire
