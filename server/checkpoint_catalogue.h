// SPDX-License-Identifier: Apache-2.0
// The checkpoints and snapshots in a state directory, as their files tell of
// them.
#pragma once

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gradwire/v1/checkpoints.pb.h"
#include "server/names.h"

namespace gradwire {

// Attributes of a training's checkpoint: how many seconds after it was made it
// expires; and, with this before their names, what the client has given with
// it.
inline constexpr char kTtlAttribute[] = "ttl_seconds";
inline constexpr char kUserAttribute[] = "user_metadata.";

// Thread rule: any thread.
class CheckpointCatalogue {
 public:
  // Those in <jobs_directory>/<job>/checkpoints and /snapshots.
  explicit CheckpointCatalogue(std::string jobs_directory)
      : jobs_directory_(std::move(jobs_directory)) {}

  std::string DirectoryOf(const CheckpointRef& ref) const;
  // Whether there is, or was, such a job.
  bool KnowsJob(const std::string& job_id) const;

  // Of one job, or of all if `job_id` is empty; the oldest first. Those that
  // are damaged have an error in place of what is not known.
  absl::StatusOr<std::vector<v1::Checkpoint>> List(
      const std::string& job_id) const;
  // All that there are, by name alone: in each job checkpoints, then snapshots.
  absl::StatusOr<std::vector<CheckpointRef>> Refs() const;
  // Errors: those of StateReader, or of ReadSnapshot.
  absl::StatusOr<v1::Checkpoint> Get(const CheckpointRef& ref) const;
  // Errors: also those of ReadChain and SnapshotImage.
  absl::StatusOr<v1::Checkpoint> Verify(const CheckpointRef& ref) const;
  // Also one that is damaged. Errors: CHECKPOINT_NOT_FOUND;
  // SNAPSHOT_HAS_CHILDREN; the file system's.
  absl::StatusOr<v1::Checkpoint> Delete(const CheckpointRef& ref) const;
  // Deletes what has expired at `now`, and returns the paths. Goes on after an
  // error, and returns the first one at the end.
  absl::Status DeleteExpired(absl::Time now,
                             std::vector<std::string>& paths) const;
  // `shard_bytes`: as in PromoteRequest.
  // Errors: those of PromoteSnapshot; CHECKPOINT_KIND_MISMATCH.
  absl::StatusOr<v1::PromotedModel> Promote(const CheckpointRef& ref,
                                            const std::string& model_id,
                                            int64_t shard_bytes) const;
  // Errors: those of ReadChain and SnapshotImage; CHECKPOINT_KIND_MISMATCH.
  absl::StatusOr<v1::CheckpointDiff> Diff(const CheckpointRef& from,
                                          const CheckpointRef& to) const;
  // The file. Errors: as Diff; those of the format's encoder.
  absl::StatusOr<std::string> ExportDiff(const CheckpointRef& from,
                                         const CheckpointRef& to,
                                         v1::DiffFormat format) const;

 private:
  // Held while something is removed or promoted: what a promotion reads stays.
  static std::mutex& Removals();

  // Names and place.
  v1::Checkpoint Row(const CheckpointRef& ref) const;
  absl::StatusOr<v1::Checkpoint> GetSnapshot(const CheckpointRef& ref) const;
  absl::Status VerifySnapshot(const CheckpointRef& ref) const;
  absl::StatusOr<v1::Checkpoint> VerifyState(const CheckpointRef& ref) const;
  absl::Status ListSnapshotsOf(const std::string& job,
                               std::vector<v1::Checkpoint>& rows) const;
  absl::Status ListStatesOf(const std::string& job,
                            std::vector<v1::Checkpoint>& rows) const;
  std::string SnapshotsOf(const std::string& job) const;

  const std::string jobs_directory_;
};

}  // namespace gradwire
