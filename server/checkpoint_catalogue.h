// SPDX-License-Identifier: Apache-2.0
// The checkpoints in a state directory, as their files tell of them.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gradwire/v1/checkpoints.pb.h"
#include "server/names.h"

namespace gradwire {

// Thread rule: any thread.
class CheckpointCatalogue {
 public:
  // Those in <jobs_directory>/<job>/checkpoints.
  explicit CheckpointCatalogue(std::string jobs_directory)
      : jobs_directory_(std::move(jobs_directory)) {}

  std::string DirectoryOf(const CheckpointRef& ref) const;
  // Whether there is, or was, such a job.
  bool KnowsJob(const std::string& job_id) const;

  // Of one job, or of all if `job_id` is empty; the oldest first. Those that
  // are damaged have an error in place of what is not known.
  absl::StatusOr<std::vector<v1::Checkpoint>> List(
      const std::string& job_id) const;
  // Errors: those of StateReader.
  absl::StatusOr<v1::Checkpoint> Get(const CheckpointRef& ref) const;
  absl::StatusOr<v1::Checkpoint> Verify(const CheckpointRef& ref) const;
  // Also one that is damaged. Errors: CHECKPOINT_NOT_FOUND; the file system's.
  absl::StatusOr<v1::Checkpoint> Delete(const CheckpointRef& ref) const;

 private:
  // Names and place.
  v1::Checkpoint Row(const CheckpointRef& ref) const;

  const std::string jobs_directory_;
};

}  // namespace gradwire
