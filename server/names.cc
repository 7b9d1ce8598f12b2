// SPDX-License-Identifier: Apache-2.0
#include "server/names.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/error.h"
#include "base/status.h"

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

absl::StatusOr<CheckpointRef> ParseCheckpointRef(const std::string& ref,
                                                 const std::string& job_id,
                                                 const std::string& field) {
  const std::string path(absl::StripPrefix(ref, "gradwire://"));
  const std::vector<std::string> parts = absl::StrSplit(path, '/');
  CheckpointRef parsed;
  if (parts.size() == 1 && path == ref && !job_id.empty()) {
    parsed = {job_id, ref};
  } else if (parts.size() == 4 && parts[0] == "jobs" &&
             parts[2] == "checkpoints") {
    parsed = {parts[1], parts[3]};
  } else {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
        .With("field", field)
        .With("value", ref.substr(0, 256))
        .With("limit", "jobs/JOB/checkpoints/NAME")
        .Message(field +
                 " must be jobs/JOB/checkpoints/NAME, as save_state returned "
                 "it" +
                 (job_id.empty() ? "." : ", or a name of this job."));
  }
  GW_RETURN_IF_ERROR(CheckJobId(parsed.job_id));
  GW_RETURN_IF_ERROR(CheckName(parsed.name, field));
  return parsed;
}

}  // namespace gradwire
