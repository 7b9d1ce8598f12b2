// SPDX-License-Identifier: Apache-2.0
#include "server/names.h"

#include <algorithm>

#include "base/error.h"

namespace gradwire {
namespace {

bool IsAlnum(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
         (c >= 'A' && c <= 'Z');
}

}  // namespace

absl::Status CheckName(const std::string& name, const std::string& field) {
  const bool good = !name.empty() && name.size() <= 128 && name[0] != '.' &&
                    std::all_of(name.begin(), name.end(), [](char c) {
                      return IsAlnum(c) || c == '.' || c == '_' || c == '-';
                    });
  if (good) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
      .With("field", field)
      .With("value", name.substr(0, 128))
      .With("limit", "1-128 of [A-Za-z0-9._-]")
      .Message(field +
               " must be 1 to 128 of [A-Za-z0-9._-], not starting with "
               "a dot.");
}

absl::Status CheckJobId(const std::string& job_id) {
  const bool good =
      !job_id.empty() && job_id.size() <= 63 && job_id[0] != '-' &&
      std::all_of(job_id.begin(), job_id.end(), [](char c) {
        return (IsAlnum(c) && !(c >= 'A' && c <= 'Z')) || c == '-';
      });
  if (good) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
      .With("field", "job_id")
      .With("value", job_id.substr(0, 64))
      .With("limit", "1-63 of [a-z0-9-]")
      .Message(
          "job_id must be 1 to 63 of [a-z0-9-], starting with a letter or "
          "digit.");
}

}  // namespace gradwire
