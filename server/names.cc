// SPDX-License-Identifier: Apache-2.0
#include "server/names.h"

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

constexpr std::string_view kCrossJob = "cross_job://";

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

absl::Status CheckNewName(const std::string& name, const std::string& field) {
  GW_RETURN_IF_ERROR(CheckName(name, field));
  if (name != "latest") return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
      .With("field", field)
      .With("value", name)
      .With("limit", "any other name")
      .Message("\"latest\" is reserved; choose another name.");
}

namespace {

absl::Status CheckId(const std::string& id, const std::string& field) {
  const bool good =
      !id.empty() && id.size() <= 63 && id[0] != '-' &&
      std::all_of(id.begin(), id.end(), [](char c) {
        return (IsAlnum(c) && !(c >= 'A' && c <= 'Z')) || c == '-';
      });
  if (good) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
      .With("field", field)
      .With("value", id.substr(0, 64))
      .With("limit", "1-63 of [a-z0-9-]")
      .Message(field +
               " must be 1 to 63 of [a-z0-9-], starting with a letter or "
               "digit.");
}

}  // namespace

absl::Status CheckJobId(const std::string& job_id) {
  return CheckId(job_id, "job_id");
}

absl::Status CheckModelId(const std::string& model_id) {
  return CheckId(model_id, "model_id");
}

namespace {

// jobs/JOB/FOLDER/NAME, also after gradwire://, or cross_job://JOB/NAME;
// nullopt if it is none.
std::optional<CheckpointRef> Split(const std::string& ref) {
  if (ref.starts_with(kCrossJob)) {
    const std::vector<std::string> parts =
        absl::StrSplit(ref.substr(kCrossJob.size()), '/');
    if (parts.size() != 2) return std::nullopt;
    return CheckpointRef{parts[0], parts[1], false};
  }
  const std::string path(absl::StripPrefix(ref, "gradwire://"));
  const std::vector<std::string> parts = absl::StrSplit(path, '/');
  if (parts.size() != 4 || parts[0] != "jobs") return std::nullopt;
  CheckpointRef parsed = {parts[1], parts[3], parts[2] == "snapshots"};
  if (parts[2] != parsed.folder()) return std::nullopt;
  return parsed;
}

absl::Status NoPath(const std::string& ref, const std::string& field,
                    const std::string& grammar, const std::string& message) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
      .With("field", field)
      .With("value", ref.substr(0, 256))
      .With("limit", grammar)
      .Message(field + " must be " + grammar + message);
}

absl::StatusOr<CheckpointRef> CheckRef(CheckpointRef ref,
                                       const std::string& field) {
  GW_RETURN_IF_ERROR(CheckJobId(ref.job_id));
  GW_RETURN_IF_ERROR(CheckName(ref.name, field));
  return ref;
}

}  // namespace

absl::StatusOr<CheckpointRef> ParseCheckpointRef(const std::string& ref,
                                                 const std::string& job_id,
                                                 const std::string& field) {
  std::optional<CheckpointRef> parsed = Split(ref);
  if (!parsed && ref.find('/') == std::string::npos && !job_id.empty()) {
    parsed = {job_id, ref, false};
  }
  if (!parsed) {
    return NoPath(
        ref, field, "jobs/JOB/checkpoints/NAME",
        ", as save_state returned it" +
            std::string(job_id.empty() ? "." : ", or a name of this job."));
  }
  GW_ASSIGN_OR_RETURN(CheckpointRef checked,
                      CheckRef(*std::move(parsed), field));
  if (!checked.snapshot) return checked;
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "CHECKPOINT_KIND_MISMATCH")
      .With("field", field)
      .With("value", ref.substr(0, 256))
      .With("limit", "jobs/JOB/checkpoints/NAME")
      .Message(
          "A snapshot has weights alone, and cannot be loaded into a training; "
          "give a checkpoint that save_state returned, or begin a job with the "
          "snapshot as its base model.");
}

absl::StatusOr<CheckpointRef> ParseCatalogueRef(const std::string& ref,
                                                const std::string& field) {
  std::optional<CheckpointRef> parsed = Split(ref);
  if (!parsed) {
    return NoPath(ref, field,
                  "jobs/JOB/checkpoints/NAME or jobs/JOB/snapshots/NAME",
                  ", as the list has it.");
  }
  return CheckRef(*std::move(parsed), field);
}

absl::StatusOr<std::string> ParseParent(const std::string& ref,
                                        const std::string& job_id) {
  std::optional<CheckpointRef> parsed = Split(ref);
  if (!parsed) parsed = {job_id, ref, true};
  if (!parsed->snapshot) {
    return NoPath(ref, "parent", "jobs/JOB/snapshots/NAME",
                  ", or a name of this job.");
  }
  GW_ASSIGN_OR_RETURN(const CheckpointRef checked,
                      CheckRef(*std::move(parsed), "parent"));
  if (checked.job_id == job_id) return checked.name;
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "DELTA_PARENT_UNAVAILABLE")
      .With("field", "parent")
      .With("value", ref.substr(0, 256))
      .With("limit", "jobs/" + job_id + "/snapshots/NAME")
      .Message(
          "The parent of a delta must be a snapshot of the same job; give one, "
          "or save a base.");
}

}  // namespace gradwire
