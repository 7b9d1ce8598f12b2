// SPDX-License-Identifier: Apache-2.0
#include "server/oplog/oplog.h"

#include <algorithm>
#include <random>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "checkpoint/fence.h"
#include "server/oplog/payload_hash.h"
#include "server/oplog/segment_reader.h"

namespace gradwire {
namespace {

// Shorter records are put together in memory and written at once.
constexpr int64_t kLargeBytes = int64_t{1} << 20;
// Of large ones, what is hashed, written and given to the disk at a time.
constexpr int64_t kPartBytes = int64_t{4} << 20;

uint32_t SystemRandom() { return std::random_device()(); }

std::string DigestOf(std::string_view payload) {
  PayloadHash hash;
  hash.Update(payload);
  return hash.Digest();
}

absl::Status TooLarge(int64_t bytes) {
  return ErrorBuilder(absl::StatusCode::kResourceExhausted, "BATCH_TOO_LARGE")
      .With("value", bytes)
      .With("limit", kMaxPayloadBytes)
      .Message("The operation has " + std::to_string(bytes) +
               " bytes, more than the " + std::to_string(kMaxPayloadBytes) +
               " that the op-log takes; split the batch over several calls.");
}

}  // namespace

Oplog::Oplog(FileSystem& files, std::string directory,
             const OplogOptions& options)
    : files_(files), directory_(std::move(directory)), options_(options) {}

absl::StatusOr<std::unique_ptr<Oplog>> Oplog::Open(
    FileSystem& files, const std::string& directory,
    const OplogOptions& options) {
  GW_CHECK(options.expected.epoch > 0);
  GW_ASSIGN_OR_RETURN(OplogFindings findings,
                      ExamineOplog(files, directory, options.expected));
  const absl::Status made = files.MakeDirectory(directory, 0700);
  if (!made.ok() && !absl::IsAlreadyExists(made)) return made;
  // Whoever made it may have died before this.
  GW_RETURN_IF_ERROR(files.SyncDirectory(DirectoryOf(directory)));
  GW_RETURN_IF_ERROR(MendOplog(files, directory, &findings));

  std::unique_ptr<Oplog> log(new Oplog(files, directory, options));
  log->segments_ = std::move(findings.segments);
  log->end_ = log->durable_ = findings.end;
  std::lock_guard<std::mutex> append_lock(log->append_mutex_);
  GW_RETURN_IF_ERROR(log->BeginSegment());
  GW_ASSIGN_OR_RETURN(const Range first,
                      log->AppendHere({.type = OplogType::kEpoch,
                                       .epoch = options.expected.epoch,
                                       .payload = {}}));
  GW_RETURN_IF_ERROR(log->Sync(first.end));
  return log;
}

absl::Status Oplog::BeginSegment() {
  const auto random = options_.random ? options_.random : SystemRandom;
  SegmentHeader header = {.epoch = options_.expected.epoch, .begin = end()};
  header.tag = random();
  header.seed = random();
  const std::string name = SegmentName(header.epoch, header.begin);
  const std::string path = directory_ + "/" + name;
  GW_ASSIGN_OR_RETURN(std::shared_ptr<File> file, files_.Create(path));
  const absl::Status written = file->WriteAt(0, EncodeSegmentHeader(header));
  if (!written.ok()) {
    // The name will be wanted again.
    const absl::Status removed = files_.Remove(path);
    return removed.ok() ? written : Fail(removed);
  }
  absl::Status synced = file->Sync();
  if (synced.ok()) synced = files_.SyncDirectory(directory_);
  if (!synced.ok()) return Fail(synced);

  segment_ = header;
  segment_end_ = kSegmentHeaderBytes;
  sealed_ = false;
  std::lock_guard<std::mutex> lock(mutex_);
  segments_.push_back(
      {.name = name, .begin = header.begin, .epoch = header.epoch});
  file_ = std::move(file);
  return absl::OkStatus();
}

absl::StatusOr<Oplog::Range> Oplog::Append(const OplogEntry& entry) {
  GW_CHECK(entry.type != OplogType::kEpoch && entry.type != OplogType::kSeal);
  const int64_t payload_bytes = std::ssize(entry.payload);
  if (payload_bytes > kMaxPayloadBytes) return TooLarge(payload_bytes);
  if (entry.epoch != options_.expected.epoch) {
    return EpochFenced(entry.epoch, options_.expected.epoch);
  }
  std::lock_guard<std::mutex> append_lock(append_mutex_);
  GW_RETURN_IF_ERROR(failure());
  GW_RETURN_IF_ERROR(
      MakeRoom(RecordHeader{.payload_bytes = payload_bytes}.record_bytes()));
  return AppendHere(entry);
}

absl::Status Oplog::MakeRoom(int64_t record_bytes) {
  const int64_t with_seal =
      segment_end_ + record_bytes + RecordHeader().record_bytes();
  const bool empty = segment_end_ == kSegmentHeaderBytes;
  if (!sealed_ && (empty || with_seal <= options_.segment_bytes)) {
    return absl::OkStatus();
  }
  if (!sealed_) {
    GW_RETURN_IF_ERROR(AppendHere({.type = OplogType::kSeal,
                                   .epoch = options_.expected.epoch,
                                   .payload = {}})
                           .status());
    sealed_ = true;
  }
  // A segment is begun only when all before it is durable: the reader relies
  // on it.
  GW_RETURN_IF_ERROR(Sync(end()));
  return BeginSegment();
}

absl::StatusOr<Oplog::Range> Oplog::AppendHere(const OplogEntry& entry) {
  const RecordHeader header = {.type = entry.type,
                               .payload_bytes = std::ssize(entry.payload),
                               .handle = entry.handle,
                               .seq_id = entry.seq_id,
                               .epoch = entry.epoch,
                               .durable_offset = durable_offset()};
  const Range range = {end(), end() + header.record_bytes()};
  const absl::Status written = WriteRecord(
      segment_end_, EncodeRecordHeader(header, segment_, range.begin),
      entry.payload);
  if (!written.ok()) {
    GW_RETURN_IF_ERROR(CutTo(segment_end_));
    return written;
  }
  segment_end_ += header.record_bytes();
  std::lock_guard<std::mutex> lock(mutex_);
  end_ = range.end;
  return range;
}

absl::Status Oplog::WriteRecord(int64_t position, const std::string& header,
                                std::string_view payload) {
  if (std::ssize(payload) < kLargeBytes) {
    buffer_.assign(header);
    buffer_.append(payload);
    buffer_.append(DigestOf(payload));
    return file_->WriteAt(position, buffer_);
  }
  GW_RETURN_IF_ERROR(file_->WriteAt(position, header));
  position += kRecordHeaderBytes;
  PayloadHash hash;
  while (!payload.empty()) {
    const std::string_view part = payload.substr(0, kPartBytes);
    GW_RETURN_IF_ERROR(file_->WriteAt(position, part));
    file_->StartWriteBack(position, std::ssize(part));
    hash.Update(part);
    position += std::ssize(part);
    payload.remove_prefix(part.size());
  }
  return file_->WriteAt(position, hash.Digest());
}

absl::Status Oplog::CutTo(int64_t position) {
  // Synced, for otherwise a page of the record that was refused could come
  // through instead of one of the next.
  absl::Status cut = file_->Truncate(position);
  if (cut.ok()) cut = file_->Sync();
  if (!cut.ok()) return Fail(cut);
  std::lock_guard<std::mutex> lock(mutex_);
  durable_ = std::max(durable_, end_);
  return absl::OkStatus();
}

absl::Status Oplog::Sync(int64_t through) {
  std::unique_lock<std::mutex> lock(mutex_);
  GW_CHECK(through <= end_);
  while (durable_ < through) {
    if (!failure_.ok()) return failure_;
    if (syncing_) {
      sync_done_.wait(lock);
      continue;
    }
    syncing_ = true;
    const std::shared_ptr<File> file = file_;
    const int64_t target = end_;
    lock.unlock();
    const absl::Status synced = file->Sync();
    lock.lock();
    syncing_ = false;
    if (synced.ok()) {
      durable_ = std::max(durable_, target);
    } else if (failure_.ok()) {
      failure_ = synced;
    }
    sync_done_.notify_all();
  }
  return absl::OkStatus();
}

absl::Status Oplog::Read(
    int64_t from,
    const std::function<absl::Status(const OplogRecord&)>& visit) const {
  std::vector<Segment> segments;
  int64_t end = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    segments = segments_;
    end = end_;
  }
  GW_CHECK(from >= segments.front().begin);
  std::string payload;
  for (size_t i = 0; i < segments.size(); ++i) {
    const bool last = i + 1 == segments.size();
    const int64_t segment_end = last ? end : segments[i + 1].begin;
    if (segment_end <= from) continue;
    GW_ASSIGN_OR_RETURN(
        const std::unique_ptr<SegmentReader> reader,
        SegmentReader::Open(files_, directory_, segments[i].name));
    if (!reader->valid()) {
      return OplogCorrupt(segments[i].name, segments[i].begin,
                          "there is no segment header");
    }
    while (reader->offset() < segment_end) {
      OplogRecord record;
      record.begin = reader->offset();
      // What lies before `from` is passed without being kept.
      const bool wanted = record.begin >= from;
      GW_ASSIGN_OR_RETURN(
          const SegmentReader::Found found,
          reader->Next(&record.header, wanted ? &payload : nullptr));
      if (found != SegmentReader::Found::kRecord) {
        return OplogCorrupt(segments[i].name, record.begin,
                            "there is no record");
      }
      if (!wanted) continue;
      record.end = reader->offset();
      record.payload = payload;
      GW_RETURN_IF_ERROR(visit(record));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<OplogRecord> Oplog::ReadOne(int64_t at,
                                           std::string* payload) const {
  Segment segment;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    GW_CHECK(at >= segments_.front().begin && at < end_);
    for (const Segment& candidate : segments_) {
      if (candidate.begin <= at) segment = candidate;
    }
  }
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<SegmentReader> reader,
                      SegmentReader::Open(files_, directory_, segment.name));
  OplogRecord record;
  record.begin = at;
  bool good = reader->valid();
  if (good) {
    reader->Seek(at);
    GW_ASSIGN_OR_RETURN(const SegmentReader::Found found,
                        reader->Next(&record.header, payload));
    good = found == SegmentReader::Found::kRecord;
  }
  if (!good) return OplogCorrupt(segment.name, at, "there is no record");
  record.end = reader->offset();
  record.payload = *payload;
  return record;
}

absl::Status Oplog::Trim(int64_t below) {
  std::lock_guard<std::mutex> append_lock(append_mutex_);
  GW_RETURN_IF_ERROR(trim_failure_);
  // Where the log ends must be known from what is left: of a segment that has
  // no durable record, nothing may be left after a power loss.
  const int64_t most = std::min(below, durable_offset() - 1);
  // segments_ changes with append_mutex_ held only.
  while (segments_.size() > 1 && segments_[1].begin <= most) {
    GW_RETURN_IF_ERROR(files_.Remove(directory_ + "/" + segments_[0].name));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      segments_.erase(segments_.begin());
    }
    // One at a time: were the second gone and the first still there, the log
    // would have a hole.
    trim_failure_ = files_.SyncDirectory(directory_);
    GW_RETURN_IF_ERROR(trim_failure_);
  }
  return absl::OkStatus();
}

int64_t Oplog::begin() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return segments_.front().begin;
}

int64_t Oplog::end() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return end_;
}

int64_t Oplog::durable_offset() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return durable_;
}

absl::Status Oplog::failure() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

absl::Status Oplog::Fail(const absl::Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.ok()) failure_ = status;
  sync_done_.notify_all();
  return failure_;
}

}  // namespace gradwire
