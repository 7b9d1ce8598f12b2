// SPDX-License-Identifier: Apache-2.0
// Names that clients choose and that become parts of paths.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace gradwire {

// One path segment: 1-128 of [A-Za-z0-9._-], not starting with a dot.
// Errors: INVALID_ARGUMENT INVALID_NAME.
absl::Status CheckName(const std::string& name, const std::string& field);
// What a checkpoint is called, and where it is:
// jobs/<job_id>/checkpoints/<name>.
struct CheckpointRef {
  std::string job_id;
  std::string name;

  std::string path() const { return "jobs/" + job_id + "/checkpoints/" + name; }
};
// A path, also after gradwire://; or a name of `job_id`, unless that is empty.
// Errors: INVALID_NAME, of `field`.
absl::StatusOr<CheckpointRef> ParseCheckpointRef(const std::string& ref,
                                                 const std::string& job_id,
                                                 const std::string& field);
// 1-63 of [a-z0-9-], starting with a letter or digit.
absl::Status CheckJobId(const std::string& job_id);

}  // namespace gradwire
