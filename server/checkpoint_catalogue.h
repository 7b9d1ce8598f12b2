// SPDX-License-Identifier: Apache-2.0
// The checkpoints and snapshots in a state directory: what they hold, as their
// files tell of them; when they were made and when they go, as the metadata do.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/manifest.h"
#include "checkpoint/training_state.h"
#include "gradwire/v1/checkpoints.pb.h"
#include "server/metadata/metadata.h"
#include "server/names.h"

namespace gradwire {

// Attributes of a training's checkpoint: how many seconds after it was made it
// expires; and, with this before their names, what the client has given with
// it.
inline constexpr char kTtlAttribute[] = "ttl_seconds";
inline constexpr char kUserAttribute[] = "user_metadata.";

// Errors: INVALID_ARGUMENT OPTION_OUT_OF_RANGE.
absl::Status CheckTtl(double seconds);

// Errors of all methods, beside those named: the file system's and those of
// Metadata; of all that change something EPOCH_FENCED.
// Thread rule: any thread.
class CheckpointCatalogue {
 public:
  // Those in <jobs_directory>/<job>/checkpoints and /snapshots. The others
  // outlive it.
  CheckpointCatalogue(std::string jobs_directory, FileSystem& files,
                      Metadata& metadata)
      : jobs_directory_(std::move(jobs_directory)),
        files_(&files),
        metadata_(&metadata) {}

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
  // Deletes what has expired at `now`, and returns it. Goes on after an
  // error, and returns the first one at the end. `before`: asked of each, and
  // that stays which it has an error for.
  using BeforeDelete = std::function<absl::Status(const CheckpointRef& ref,
                                                  const std::string& digest)>;
  struct Deleted {
    CheckpointRef ref;
    std::string digest;
  };
  absl::Status DeleteExpired(absl::Time now, const BeforeDelete& before,
                             std::vector<Deleted>& deleted) const;
  // Of a job whose ranks have ended: what they had begun to save, which nobody
  // ends.
  absl::Status RemoveUnfinished(const std::string& job_id) const;
  // It was published: from now on its times are in the metadata. If it has gone
  // already, nothing is done. `asked_micros`: when the save was asked for; if
  // that has run before, the metadata may know it already.
  absl::Status Saved(const CheckpointRef& ref, bool again,
                     int64_t asked_micros) const;
  // What comes from elsewhere will be published: it is as old as it was, and
  // does not expire, unless the metadata know better.
  absl::Status WillFetch(const CheckpointRef& ref, const std::string& digest,
                         const std::string& kind, int64_t created_micros) const;
  // It expires so many seconds after it was made; 0: never.
  // Errors: as Get.
  absl::StatusOr<v1::Checkpoint> SetTtl(const CheckpointRef& ref,
                                        double ttl_seconds) const;
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
  // By path.
  using Known = std::map<std::string, CheckpointRow>;

  // Names and place.
  v1::Checkpoint Row(const CheckpointRef& ref) const;
  absl::StatusOr<Known> AllKnown() const;
  absl::StatusOr<Known> KnownOf(const CheckpointRef& ref) const;
  void Fill(const StateHeader& header, const std::string& digest,
            const Known& known, v1::Checkpoint& row) const;
  void Fill(const StateReader& reader, const Known& known,
            v1::Checkpoint& row) const;
  void Fill(const SnapshotManifest& manifest, const Known& known,
            v1::Checkpoint& row) const;
  absl::StatusOr<v1::Checkpoint> GetState(const CheckpointRef& ref,
                                          const Known& known) const;
  // Puts what the metadata do not know of there: it was saved while they could
  // not be written, or by an older server.
  void Learn(const CheckpointRef& ref, const Known& known,
             const v1::Checkpoint& row) const;
  absl::Status DeleteExpiredStates(const std::string& job, int64_t now_micros,
                                   const Known& known,
                                   const BeforeDelete& before,
                                   std::vector<Deleted>& deleted) const;
  absl::StatusOr<v1::Checkpoint> GetSnapshot(const CheckpointRef& ref) const;
  absl::Status VerifySnapshot(const CheckpointRef& ref) const;
  absl::StatusOr<v1::Checkpoint> VerifyState(const CheckpointRef& ref) const;
  absl::Status ListSnapshotsOf(const std::string& job, const Known& known,
                               std::vector<v1::Checkpoint>& rows) const;
  absl::Status ListStatesOf(const std::string& job, const Known& known,
                            std::vector<v1::Checkpoint>& rows) const;
  std::string SnapshotsOf(const std::string& job) const;

  const std::string jobs_directory_;
  FileSystem* const files_;
  Metadata* const metadata_;
};

}  // namespace gradwire
