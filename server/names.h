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
// Of what is to be made: not "latest" either, which is reserved.
absl::Status CheckNewName(const std::string& name, const std::string& field);
// What a checkpoint or a snapshot is called, and where it is:
// jobs/<job_id>/checkpoints/<name>, jobs/<job_id>/snapshots/<name>.
struct CheckpointRef {
  std::string job_id;
  std::string name;
  bool snapshot = false;

  const char* folder() const { return snapshot ? "snapshots" : "checkpoints"; }
  std::string path() const {
    return "jobs/" + job_id + "/" + folder() + "/" + name;
  }
};
// A path of a checkpoint, also after gradwire://; or a name of `job_id`, unless
// that is empty. Errors, of `field`: INVALID_NAME; INVALID_ARGUMENT
// CHECKPOINT_KIND_MISMATCH: a snapshot's path.
absl::StatusOr<CheckpointRef> ParseCheckpointRef(const std::string& ref,
                                                 const std::string& job_id,
                                                 const std::string& field);
// The path of either, also after gradwire://. Errors: INVALID_NAME.
absl::StatusOr<CheckpointRef> ParseCatalogueRef(const std::string& ref,
                                                const std::string& field);
// The name of a snapshot of `job_id`, given as that or by its path.
// Errors: INVALID_NAME; FAILED_PRECONDITION DELTA_PARENT_UNAVAILABLE: it is
// another job's.
absl::StatusOr<std::string> ParseParent(const std::string& ref,
                                        const std::string& job_id);
// 1-63 of [a-z0-9-], starting with a letter or digit.
absl::Status CheckJobId(const std::string& job_id);
// The same, of a promoted model.
absl::Status CheckModelId(const std::string& model_id);

}  // namespace gradwire
