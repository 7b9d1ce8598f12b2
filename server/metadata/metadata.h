// SPDX-License-Identifier: Apache-2.0
// What the server knows of its jobs beside their op-logs: who they are, who
// holds them, what their logs have let go. One SQLite file; docs/recovery.md.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/metadata/database.h"

namespace gradwire {

// Protocol buffers are kept as their bytes: what they mean is the caller's.

struct JobRow {
  enum State { kLive = 0, kFailed = 1, kDeleted = 2 };
  std::string job_id;
  std::string spec;
  int64_t created_microseconds = 0;
  State state = kLive;
  std::string error;    // of kFailed
  std::string profile;  // empty until it was ready once
  int64_t log_watermark = 0;
  int64_t log_begin = 0;
};

struct HandleRow {
  int64_t number = 0;  // from 1, in the order of attaching
  std::string model_id;
  std::string session_id;
  std::string request;
  bool attached = false;  // to weights that were there
  // Numbers below count as executed, whatever is known of them.
  int64_t closed_below = 0;
  // By a restart of its job. Others are by the handle that came after them.
  bool fenced = false;
};

// An operation that has ended.
struct OperationRow {
  int64_t handle = 0;
  int64_t seq = 0;
  std::string outcome;
};

// A checkpoint that a job's recovery can begin with.
struct RecoveryPoint {
  int64_t number = 0;       // names its directory
  int64_t replay_from = 0;  // outcomes in the log from here on are not in it
  int64_t optimizer_step = 0;
  int64_t weight_version = 0;
};

// What the kernels of one of its ranks have decided: Kernels::TakeChoices.
struct KernelChoicesRow {
  int rank = 0;
  std::string choices;
};

struct SessionRow {
  std::string session_id;
  bool finished = false;
};

// A checkpoint or snapshot that was published. Its files say what it holds;
// this, what they cannot: when it was made, and when it goes, which may change.
// Times are microseconds since 1970.
struct CheckpointRow {
  std::string path;    // jobs/<job>/checkpoints/<name> or .../snapshots/<name>
  std::string digest;  // of its files: of others with this name it says nothing
  std::string kind;    // "training", "base", "delta"
  bool promotable = false;
  int64_t created_microseconds = 0;
  int64_t expires_microseconds = 0;  // 0: never
};

struct RemovalRow {
  std::string path;    // as in CheckpointRow
  std::string digest;  // of what is to go; "": of whatever is there
};

// Errors of all methods: those of Database; of all that write:
// FAILED_PRECONDITION EPOCH_FENCED (epoch, highest): another server has taken
// the lease since. After OK what was written outlasts a power loss.
//
// Thread rule: all methods from any thread.
class Metadata {
 public:
  // Takes the lease: epoch() is above all that there were, and above `seen`,
  // which is known from elsewhere: the file may be from a backup.
  static absl::StatusOr<std::unique_ptr<Metadata>> Open(const std::string& path,
                                                        int64_t seen = 0);

  int64_t epoch() const { return epoch_; }
  // Of this file; twelve of [0-9a-f].
  const std::string& server_id() const { return server_id_; }

  absl::Status AddSession(const std::string& session_id);
  absl::Status FinishSession(const std::string& session_id);
  absl::StatusOr<std::vector<SessionRow>> Sessions();

  absl::Status AddJob(const JobRow& job);
  // Undoes AddJob of a job that could not be begun.
  absl::Status ForgetJob(const std::string& job_id);
  // Of a deleted one nothing stays but its name, and it stays deleted: a
  // failure of its ranks may come later.
  absl::Status SetJobState(const std::string& job_id, JobRow::State state,
                           const std::string& error);
  absl::Status SetProfile(const std::string& job_id,
                          const std::string& profile);
  // Until the job is deleted.
  absl::Status AddChoices(const std::string& job_id,
                          const std::vector<KernelChoicesRow>& rows);
  // Oldest first.
  absl::StatusOr<std::vector<KernelChoicesRow>> Choices(
      const std::string& job_id);
  // Oldest first.
  absl::StatusOr<std::vector<JobRow>> Jobs();

  absl::Status AddHandle(const std::string& job_id, const HandleRow& handle);
  // All that the job has.
  absl::Status FenceHandles(const std::string& job_id);
  absl::StatusOr<std::vector<HandleRow>> Handles(const std::string& job_id);

  absl::Status SetWatermark(const std::string& job_id, int64_t watermark);

  // What a job's log may let go afterwards, in one transaction.
  struct Reference {
    std::vector<OperationRow> operations;
    // (handle, closed_below)
    std::vector<std::pair<int64_t, int64_t>> closed;
    // Of a job with a state: the new point, and the oldest that stays.
    const RecoveryPoint* point = nullptr;
    int64_t oldest_point = 0;
    int64_t log_begin = 0;
  };
  absl::Status AddReference(const std::string& job_id,
                            const Reference& reference);
  absl::StatusOr<std::vector<OperationRow>> Operations(
      const std::string& job_id);
  // Oldest first.
  absl::StatusOr<std::vector<RecoveryPoint>> Points(const std::string& job_id);

  // That it was published. It is younger than all of its job, whatever the
  // clock says.
  absl::Status AddCheckpoint(const CheckpointRow& row);
  // As it is given.
  absl::Status PutCheckpoint(const CheckpointRow& row);
  // The same, unless something is known of the same files.
  absl::Status LearnCheckpoint(const CheckpointRow& row);
  // The same, unless something is known of other files with this name: false.
  absl::StatusOr<bool> ChangeCheckpoint(const CheckpointRow& row);
  // What is known of these files.
  absl::Status ForgetCheckpoint(const std::string& path,
                                const std::string& digest);
  absl::StatusOr<std::optional<CheckpointRow>> FindCheckpoint(
      const std::string& path);
  // By path.
  absl::StatusOr<std::vector<CheckpointRow>> Checkpoints();

  // From now on there is an object store: AddCheckpoint and LearnCheckpoint add
  // a removal of a training checkpoint whose place another one has taken.
  void RememberReplaced();

  // Copies in an object store that are to go, until they have.
  absl::Status AddRemoval(const RemovalRow& row);
  // The row as it is given: of another digest it stays.
  absl::Status EndRemoval(const RemovalRow& row);
  absl::StatusOr<std::vector<RemovalRow>> Removals();

 private:
  Metadata() = default;

  // Runs `write` in a transaction, unless the lease is lost; again in another
  // one, if the disk is full of what the write-ahead log need not keep.
  absl::Status Transact(const std::function<absl::Status()>& write);
  absl::Status TransactOnce(const std::function<absl::Status()>& write);
  // In a transaction: `row` takes the place of what was `known`.
  absl::Status NoteReplaced(const std::optional<CheckpointRow>& known,
                            const CheckpointRow& row);

  std::mutex mutex_;
  std::unique_ptr<Database> database_;  // guarded by mutex_
  int64_t epoch_ = 0;
  std::string server_id_;
  bool remember_replaced_ = false;  // guarded by mutex_
};

}  // namespace gradwire
