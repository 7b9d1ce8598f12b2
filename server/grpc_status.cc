// SPDX-License-Identifier: Apache-2.0
#include "server/grpc_status.h"

#include <cmath>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "base/error.h"
#include "google/rpc/error_details.pb.h"

namespace gradwire {
namespace {

constexpr size_t kMaxValue = 256;
constexpr size_t kMaxMessage = 2048;
constexpr char kRetryKey[] = "retry_after_seconds";
constexpr double kDefaultRetrySeconds = 1, kMaxRetrySeconds = 3600;

ErrorDetail DetailOf(const absl::Status& status) {
  if (auto detail = GetErrorDetail(status)) return *detail;
  ErrorDetail detail;
  detail.reason = status.code() == absl::StatusCode::kInternal
                      ? "INTERNAL_ERROR"
                      : absl::StatusCodeToString(status.code());
  detail.category = ErrorCategory::kServer;
  return detail;
}

// The length of the UTF-8 sequence at `at`, or 0 if it is not one.
size_t SequenceLength(const std::string& text, size_t at) {
  const auto byte = [&](size_t i) {
    return static_cast<unsigned char>(text[i]);
  };
  const unsigned char first = byte(at);
  const size_t length = first < 0x80   ? 1
                        : first < 0xc2 ? 0
                        : first < 0xe0 ? 2
                        : first < 0xf0 ? 3
                        : first < 0xf5 ? 4
                                       : 0;
  if (length == 0 || at + length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(at + i) & 0xc0) != 0x80) return 0;
  }
  // Overlong forms, surrogates and what lies beyond U+10FFFF.
  if (length == 3 && first == 0xe0 && byte(at + 1) < 0xa0) return 0;
  if (length == 3 && first == 0xed && byte(at + 1) > 0x9f) return 0;
  if (length == 4 && first == 0xf0 && byte(at + 1) < 0x90) return 0;
  if (length == 4 && first == 0xf4 && byte(at + 1) > 0x8f) return 0;
  return length;
}

}  // namespace

std::string ValidText(const std::string& text, size_t limit) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t length = SequenceLength(text, at);
    if (out.size() + std::max<size_t>(length, 1) > limit) break;
    if (length == 0) {
      out += '?';
      ++at;
    } else {
      out.append(text, at, length);
      at += length;
    }
  }
  return out;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const ErrorDetail detail = DetailOf(status);
  const std::string message =
      ValidText(std::string(status.message()), kMaxMessage);
  google::rpc::Status wire;
  wire.set_code(static_cast<int>(status.code()));
  wire.set_message(message);
  google::rpc::ErrorInfo info;
  info.set_reason(detail.reason);
  info.set_domain("gradwire");
  for (const auto& [key, value] : detail.metadata) {
    (*info.mutable_metadata())[ValidText(key, kMaxValue)] =
        ValidText(value, kMaxValue);
  }
  (*info.mutable_metadata())["category"] =
      detail.category == ErrorCategory::kUser ? "USER" : "SERVER";
  wire.add_details()->PackFrom(info);
  const auto retry_after = detail.metadata.find(kRetryKey);
  const bool given = retry_after != detail.metadata.end();
  if (given || detail.reason == "QUEUE_FULL" || absl::IsUnavailable(status)) {
    double seconds =
        given ? std::strtod(retry_after->second.c_str(), nullptr) : 0;
    if (!(seconds > 0 && seconds <= kMaxRetrySeconds)) {
      seconds = kDefaultRetrySeconds;
    }
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(static_cast<int64_t>(seconds));
    retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(
        std::lround((seconds - std::floor(seconds)) * 1e9)));
    wire.add_details()->PackFrom(retry);
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message,
                      wire.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  google::rpc::Status wire;
  google::rpc::ErrorInfo info;
  if (status.ok() || !wire.ParseFromString(status.error_details()) ||
      wire.details().empty() || !wire.details(0).UnpackTo(&info)) {
    return absl::Status(code, status.error_message());
  }
  ErrorBuilder error(code, info.reason());
  for (const auto& [key, value] : info.metadata()) {
    if (key != "category") {
      error.With(key, value);
    } else if (value != "USER") {
      error.Server();
    }
  }
  return error.Message(status.error_message());
}

v1::OperationError ToOperationError(const absl::Status& status) {
  const ErrorDetail detail = DetailOf(status);
  v1::OperationError error;
  error.set_code(static_cast<int>(status.code()));
  error.set_reason(detail.reason);
  error.set_message(ValidText(std::string(status.message()), kMaxMessage));
  for (const auto& [key, value] : detail.metadata) {
    (*error.mutable_metadata())[ValidText(key, kMaxValue)] =
        ValidText(value, kMaxValue);
  }
  error.set_category(detail.category == ErrorCategory::kUser ? "USER"
                                                             : "SERVER");
  return error;
}

absl::Status FromOperationError(const v1::OperationError& error) {
  const bool failure =
      error.code() >= static_cast<int>(absl::StatusCode::kCancelled) &&
      error.code() <= static_cast<int>(absl::StatusCode::kUnauthenticated);
  ErrorBuilder builder(failure ? static_cast<absl::StatusCode>(error.code())
                               : absl::StatusCode::kUnknown,
                       error.reason());
  if (error.category() != "USER") builder.Server();
  for (const auto& [key, value] : error.metadata()) builder.With(key, value);
  return builder.Message(error.message());
}

}  // namespace gradwire
