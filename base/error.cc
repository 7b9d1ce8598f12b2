// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"

namespace gradwire {
namespace {

constexpr char kTypeUrl[] = "gradwire.error";

// The payload is a sequence of strings, each ended by a NUL: reason, category,
// then keys and values in turn. A NUL inside a value is replaced by '?'.
void Append(std::string& out, const std::string& text) {
  for (char c : text) out.push_back(c == '\0' ? '?' : c);
  out.push_back('\0');
}

std::string Encode(const ErrorDetail& detail) {
  std::string out;
  Append(out, detail.reason);
  Append(out, detail.category == ErrorCategory::kUser ? "U" : "S");
  for (const auto& [key, value] : detail.metadata) {
    Append(out, key);
    Append(out, value);
  }
  return out;
}

}  // namespace

ErrorBuilder& ErrorBuilder::With(const std::string& key,
                                 const std::string& value) {
  detail_.metadata[key] = value;
  return *this;
}

ErrorBuilder& ErrorBuilder::With(const std::string& key, const char* value) {
  return With(key, std::string(value));
}

ErrorBuilder& ErrorBuilder::With(const std::string& key, int64_t value) {
  return With(key, std::to_string(value));
}

ErrorBuilder& ErrorBuilder::With(const std::string& key, int value) {
  return With(key, std::to_string(value));
}

ErrorBuilder& ErrorBuilder::With(const std::string& key, double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return With(key, std::string(text));
}

ErrorBuilder& ErrorBuilder::Server() {
  detail_.category = ErrorCategory::kServer;
  return *this;
}

absl::Status ErrorBuilder::Message(const std::string& message) const {
  absl::Status status(code_, message);
  status.SetPayload(kTypeUrl, absl::Cord(Encode(detail_)));
  return status;
}

std::optional<ErrorDetail> GetErrorDetail(const absl::Status& status) {
  auto payload = status.GetPayload(kTypeUrl);
  if (!payload.has_value()) return std::nullopt;
  const std::string encoded(*payload);
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t i = 0; i < encoded.size(); ++i) {
    if (encoded[i] != '\0') continue;
    parts.push_back(encoded.substr(begin, i - begin));
    begin = i + 1;
  }
  if (parts.size() < 2) return std::nullopt;
  ErrorDetail detail;
  detail.reason = parts[0];
  detail.category =
      parts[1] == "U" ? ErrorCategory::kUser : ErrorCategory::kServer;
  for (size_t i = 2; i + 1 < parts.size(); i += 2) {
    detail.metadata[parts[i]] = parts[i + 1];
  }
  return detail;
}

absl::Status WithErrorMetadata(const absl::Status& status,
                               const std::string& key,
                               const std::string& value) {
  std::optional<ErrorDetail> detail = GetErrorDetail(status);
  if (!detail.has_value()) return status;
  detail->metadata[key] = value;
  absl::Status copy = status;
  copy.SetPayload(kTypeUrl, absl::Cord(Encode(*detail)));
  return copy;
}

// Code and message, each ended by a NUL, then the payload as it is.
std::string StatusToBytes(const absl::Status& status) {
  std::string bytes;
  Append(bytes, std::to_string(static_cast<int>(status.code())));
  Append(bytes, std::string(status.message()));
  if (auto payload = status.GetPayload(kTypeUrl); payload.has_value()) {
    bytes += std::string(*payload);
  }
  return bytes;
}

absl::Status StatusFromBytes(const std::string& bytes) {
  const size_t code_end = bytes.find('\0');
  const size_t message_end = code_end == std::string::npos
                                 ? std::string::npos
                                 : bytes.find('\0', code_end + 1);
  const int code =
      message_end == std::string::npos ? 0 : std::atoi(bytes.c_str());
  if (code < 1 || code > 16) {
    return absl::InternalError("a status came in no known form");
  }
  absl::Status status(static_cast<absl::StatusCode>(code),
                      bytes.substr(code_end + 1, message_end - code_end - 1));
  if (message_end + 1 < bytes.size()) {
    status.SetPayload(kTypeUrl, absl::Cord(bytes.substr(message_end + 1)));
  }
  return status;
}

}  // namespace gradwire
