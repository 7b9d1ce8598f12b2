// SPDX-License-Identifier: Apache-2.0
#include "server/journal.h"

#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "server/failpoint.h"

namespace gradwire {

absl::StatusOr<std::unique_ptr<Journal>> Journal::Open(
    FileSystem& files, Metadata* metadata, const JobRow& job,
    const std::string& directory) {
  std::unique_ptr<Journal> journal(new Journal(metadata, job.job_id));
  GW_RETURN_IF_ERROR(MakeDirectories(files, DirectoryOf(directory)));
  OplogOptions options;
  options.expected = {.epoch = metadata->epoch(),
                      .watermark = job.log_watermark,
                      .begin = job.log_begin};
  GW_ASSIGN_OR_RETURN(journal->log_, Oplog::Open(files, directory, options));
  return journal;
}

absl::StatusOr<Oplog::Range> Journal::Append(OplogType type, int64_t handle,
                                             int64_t seq,
                                             const std::string& payload) {
  return log_->Append({.type = type,
                       .handle = handle,
                       .seq_id = seq,
                       .epoch = metadata_.epoch(),
                       .payload = payload});
}

absl::StatusOr<Oplog::Range> Journal::AppendOp(int64_t handle, int64_t seq,
                                               const v1::JournalOp& op) {
  Failpoint("oplog.before_append");
  GW_ASSIGN_OR_RETURN(
      const Oplog::Range range,
      Append(OplogType::kOp, handle, seq, op.SerializeAsString()));
  Failpoint("oplog.after_append");
  return range;
}

absl::StatusOr<Oplog::Range> Journal::AppendOutcome(
    int64_t handle, int64_t seq, const v1::JournalOutcome& outcome) {
  const bool done = outcome.operation().state() == v1::OPERATION_STATE_DONE;
  return Append(done ? OplogType::kDone : OplogType::kFailed, handle, seq,
                outcome.SerializeAsString());
}

absl::Status Journal::Sync() {
  GW_RETURN_IF_ERROR(log_->Sync(log_->end()));
  Failpoint("oplog.after_sync");
  return absl::OkStatus();
}

absl::Status Journal::SetWatermark() {
  return metadata_.SetWatermark(job_id_, log_->durable_offset());
}

absl::StatusOr<Journal::Entry> Journal::Parse(const OplogRecord& record) const {
  Entry entry;
  entry.handle = record.header.handle;
  entry.seq = record.header.seq_id;
  entry.begin = record.begin;
  const int size = static_cast<int>(record.payload.size());
  bool good = true;
  if (record.header.type == OplogType::kOp) {
    entry.op = std::make_unique<v1::JournalOp>();
    good = entry.op->ParseFromArray(record.payload.data(), size);
  } else if (record.header.type == OplogType::kDone ||
             record.header.type == OplogType::kFailed) {
    entry.outcome = std::make_unique<v1::JournalOutcome>();
    good = entry.outcome->ParseFromArray(record.payload.data(), size);
  }
  // Its digest is right, so that it is what somebody has written.
  if (!good) return OplogCorrupt("", record.begin, "a record has no meaning");
  return entry;
}

absl::Status Journal::Scan(
    const std::function<absl::Status(Entry)>& visit) const {
  std::shared_lock<std::shared_mutex> lock(trim_mutex_);
  return log_->Read(log_->begin(),
                    [&](const OplogRecord& record) -> absl::Status {
                      GW_ASSIGN_OR_RETURN(Entry entry, Parse(record));
                      if (entry.op == nullptr && entry.outcome == nullptr) {
                        return absl::OkStatus();
                      }
                      return visit(std::move(entry));
                    });
}

absl::StatusOr<Journal::Entry> Journal::Read(int64_t at) const {
  std::shared_lock<std::shared_mutex> lock(trim_mutex_);
  if (at < log_->begin()) {
    return ErrorBuilder(absl::StatusCode::kNotFound, "RECORD_TRIMMED")
        .Server()
        .With("value", at)
        .With("limit", log_->begin())
        .Message("The op-log no longer has this record.");
  }
  std::string payload;
  GW_ASSIGN_OR_RETURN(const OplogRecord record, log_->ReadOne(at, &payload));
  return Parse(record);
}

absl::Status Journal::Trim(int64_t below) {
  std::unique_lock<std::shared_mutex> lock(trim_mutex_);
  return log_->Trim(below);
}

}  // namespace gradwire
