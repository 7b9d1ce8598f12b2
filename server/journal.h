// SPDX-License-Identifier: Apache-2.0
// The durable memory of one job: its op-log, and how far the server's metadata
// vouch for it. docs/recovery.md.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <shared_mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "gradwire/v1/journal.pb.h"
#include "server/metadata/metadata.h"
#include "server/oplog/oplog.h"

namespace gradwire {

// Thread rule: all methods from any thread, without the job's mutex: they wait
// for the disk.
class Journal {
 public:
  // Recovers the log in `directory`. `metadata` outlives the journal.
  // Errors: those of Oplog::Open.
  static absl::StatusOr<std::unique_ptr<Journal>> Open(
      FileSystem& files, Metadata* metadata, const JobRow& job,
      const std::string& directory);

  // Where the record is. Errors: those of Oplog::Append.
  absl::StatusOr<Oplog::Range> AppendOp(int64_t handle, int64_t seq,
                                        const v1::JournalOp& op);
  absl::StatusOr<Oplog::Range> AppendOutcome(int64_t handle, int64_t seq,
                                             const v1::JournalOutcome& outcome);
  // Returns once all that has been appended is durable. Errors: those of
  // Oplog::Sync, which are final.
  absl::Status Sync();
  // Then the metadata are to know. Errors: those of Metadata; of a full disk,
  // may be tried again.
  absl::Status SetWatermark();

  // What is in the log, in its order. One of `op` and `outcome` is set.
  struct Entry {
    int64_t handle = 0;
    int64_t seq = 0;
    int64_t begin = 0;
    std::unique_ptr<v1::JournalOp> op;
    std::unique_ptr<v1::JournalOutcome> outcome;
  };
  absl::Status Scan(const std::function<absl::Status(Entry)>& visit) const;
  // The record that begins at `at`. Errors: NOT_FOUND RECORD_TRIMMED; those of
  // Oplog::ReadOne.
  absl::StatusOr<Entry> Read(int64_t at) const;

  // Nothing below is needed any more.
  absl::Status Trim(int64_t below);

  int64_t begin() const { return log_->begin(); }
  int64_t end() const { return log_->end(); }
  int64_t durable() const { return log_->durable_offset(); }

 private:
  Journal(Metadata* metadata, std::string job_id)
      : metadata_(*metadata), job_id_(std::move(job_id)) {}
  absl::StatusOr<Oplog::Range> Append(OplogType type, int64_t handle,
                                      int64_t seq, const std::string& payload);
  absl::StatusOr<Entry> Parse(const OplogRecord& record) const;

  Metadata& metadata_;
  const std::string job_id_;
  std::unique_ptr<Oplog> log_;
  // Shared by who reads, exclusive for who trims.
  mutable std::shared_mutex trim_mutex_;
};

}  // namespace gradwire
