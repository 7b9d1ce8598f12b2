// SPDX-License-Identifier: Apache-2.0
// The write-ahead op-log of one model: what is appended and synced is read back
// after any crash, byte for byte and in order. Format, rules and the reasons
// for them: docs/oplog.md.
//
// A log offset counts the bytes of records since the log began, over all
// segments. It never changes, and names a record for ever.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "server/oplog/format.h"
#include "server/oplog/recovery.h"

namespace gradwire {

struct OplogOptions {
  OplogExpectation expected;
  // A segment is at most this long, or holds one record.
  int64_t segment_bytes = int64_t{64} << 20;
  // A number that clients cannot guess; the system's if empty.
  std::function<uint32_t()> random;
};

// What is appended. The payload is opaque.
struct OplogEntry {
  OplogType type = OplogType::kOp;  // neither kEpoch nor kSeal
  int64_t handle = 0;
  int64_t seq_id = 0;
  int64_t epoch = 0;  // of the caller's lease
  std::string_view payload;
};

// What is read.
struct OplogRecord {
  RecordHeader header;
  int64_t begin = 0;  // log offsets
  int64_t end = 0;
  std::string_view payload;  // until the visitor returns
};

// Thread rule: any method from any thread; appends go one at a time, and do not
// wait for syncs unless a segment is full. One process per directory, which is
// the owner's to see to.
//
// A failed sync is final: from then on Append and Sync return its error, and
// what was not durable before is not acknowledged any more. Open the log again:
// that examines what is there and writes it anew.
class Oplog {
 public:
  struct Range {
    int64_t begin = 0;
    int64_t end = 0;
  };

  // Makes the directory (0700) if it is not there, recovers what is in it, and
  // begins a segment of this epoch. On return everything up to end() is
  // durable, and lower epochs are shut out for good.
  // `files` outlives the log. Errors: those of ExamineOplog; the file system's.
  static absl::StatusOr<std::unique_ptr<Oplog>> Open(
      FileSystem& files, const std::string& directory,
      const OplogOptions& options);

  // Where the record is. It is durable after Sync(its end). Errors:
  //   RESOURCE_EXHAUSTED STORAGE_FULL and others of the file system: nothing
  //   was
  //     appended, and unless a sync had failed the log goes on;
  //   RESOURCE_EXHAUSTED BATCH_TOO_LARGE (value, limit);
  //   FAILED_PRECONDITION EPOCH_FENCED (epoch, highest): `entry` is from
  //     another lease than this log was opened with.
  absl::StatusOr<Range> Append(const OplogEntry& entry);

  // Returns once everything below `through` is durable. Callers that wait
  // together share one sync. REQUIRES: through <= end().
  absl::Status Sync(int64_t through);

  // Visits the records from `from` on in order, those of the log itself
  // (kEpoch, kSeal) included, up to the end at the time of the call. Stops at
  // the first error of `visit`. REQUIRES: from >= begin(), and no Trim above
  // `from` meanwhile. Errors: DATA_LOSS OPLOG_CORRUPT; the file system's.
  absl::Status Read(
      int64_t from,
      const std::function<absl::Status(const OplogRecord&)>& visit) const;

  // The record that begins at `at`, as Append said; its payload is kept in
  // `payload`. REQUIRES: at >= begin(), and no Trim above `at` meanwhile.
  // Errors: as of Read.
  absl::StatusOr<OplogRecord> ReadOne(int64_t at, std::string* payload) const;

  // Removes the segments that lie below `below` as a whole; never the last with
  // a durable record. After an error begin() says what is left.
  absl::Status Trim(int64_t below);

  int64_t begin() const;  // of the first record that is left
  int64_t end() const;
  int64_t durable_offset() const;

 private:
  using Segment = OplogFindings::Segment;

  Oplog(FileSystem& files, std::string directory, const OplogOptions& options);

  // With append_mutex_ held.
  absl::Status MakeRoom(int64_t record_bytes);
  absl::Status BeginSegment();
  absl::StatusOr<Range> AppendHere(const OplogEntry& entry);
  absl::Status WriteRecord(int64_t position, const std::string& header,
                           std::string_view payload);
  absl::Status CutTo(int64_t position);

  absl::Status failure() const;
  // The error that sticks: `status`, or an earlier one.
  absl::Status Fail(const absl::Status& status);

  FileSystem& files_;
  const std::string directory_;
  const OplogOptions options_;

  std::mutex append_mutex_;  // before mutex_
  // Guarded by append_mutex_.
  SegmentHeader segment_;    // the one that is written
  int64_t segment_end_ = 0;  // of its file
  bool sealed_ = false;
  std::string buffer_;
  absl::Status trim_failure_;

  mutable std::mutex mutex_;
  // Guarded by mutex_; all but durable_ and failure_ change with append_mutex_
  // held as well.
  std::vector<Segment> segments_;
  std::shared_ptr<File> file_;  // of the last segment
  int64_t end_ = 0;
  int64_t durable_ = 0;
  absl::Status failure_;
  bool syncing_ = false;  // somebody syncs for all who wait
  std::condition_variable sync_done_;
};

}  // namespace gradwire
