// SPDX-License-Identifier: Apache-2.0
#include "server/oplog/segment_reader.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "server/oplog/payload_hash.h"

namespace gradwire {
namespace {

constexpr int64_t kWindowBytes = int64_t{1} << 20;

absl::Status NewerVersion(int version) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "STATE_VERSION")
      .Server()
      .With("have", version)
      .With("need", kOplogVersion)
      .Message("The op-log has format " + std::to_string(version) +
               " and this server reads format " +
               std::to_string(kOplogVersion) +
               ". Start the version of the server that wrote it, or a newer "
               "one.");
}

}  // namespace

absl::StatusOr<std::unique_ptr<SegmentReader>> SegmentReader::Open(
    FileSystem& files, const std::string& directory, const std::string& name) {
  const auto named = ParseSegmentName(name);
  GW_CHECK(named.has_value());
  std::unique_ptr<SegmentReader> reader(new SegmentReader);
  GW_ASSIGN_OR_RETURN(reader->file_, files.Open(directory + "/" + name,
                                                FileSystem::Access::kRead));
  GW_ASSIGN_OR_RETURN(reader->file_bytes_, reader->file_->Size());
  GW_ASSIGN_OR_RETURN(const std::string_view bytes,
                      reader->Fetch(0, kSegmentHeaderBytes));
  int version = 0;
  const HeaderState state =
      DecodeSegmentHeader(bytes, &reader->header_, &version);
  if (state == HeaderState::kNewerVersion) return NewerVersion(version);
  reader->valid_ = state == HeaderState::kValid &&
                   reader->header_.epoch == named->epoch &&
                   reader->header_.begin == named->begin;
  reader->offset_ = named->begin;
  return reader;
}

absl::StatusOr<std::string_view> SegmentReader::Fetch(int64_t position,
                                                      int64_t bytes) {
  GW_CHECK(bytes <= kWindowBytes);
  bytes = std::clamp<int64_t>(file_bytes_ - position, 0, bytes);
  if (position < window_begin_ ||
      position + bytes > window_begin_ + std::ssize(window_)) {
    const int64_t fill = std::min(kWindowBytes, file_bytes_ - position);
    window_.resize(static_cast<size_t>(fill));
    window_begin_ = position;
    GW_ASSIGN_OR_RETURN(const int64_t got,
                        file_->ReadAt(position, fill, window_.data()));
    // A file that has shrunk since it was measured ends where it does now.
    window_.resize(static_cast<size_t>(got));
    bytes = std::min(bytes, got);
  }
  return std::string_view(window_).substr(
      static_cast<size_t>(position - window_begin_),
      static_cast<size_t>(bytes));
}

absl::StatusOr<SegmentReader::Found> SegmentReader::Next(RecordHeader* record,
                                                         std::string* payload) {
  int64_t position = FilePosition(offset_);
  if (position == file_bytes_) return Found::kEnd;
  GW_ASSIGN_OR_RETURN(const std::string_view header,
                      Fetch(position, kRecordHeaderBytes));
  int version = 0;
  const HeaderState state =
      DecodeRecordHeader(header, header_, offset_, record, &version);
  if (state == HeaderState::kNewerVersion) return NewerVersion(version);
  // The length is only what a header declares until it is within the file.
  if (state == HeaderState::kInvalid ||
      record->record_bytes() > file_bytes_ - position) {
    return Found::kInvalid;
  }
  position += kRecordHeaderBytes;

  PayloadHash hash;
  if (payload != nullptr) {
    payload->clear();
    payload->reserve(static_cast<size_t>(record->payload_bytes));
  }
  for (int64_t left = record->payload_bytes; left > 0;) {
    GW_ASSIGN_OR_RETURN(const std::string_view part,
                        Fetch(position, std::min(left, kWindowBytes)));
    if (part.empty()) return Found::kInvalid;
    hash.Update(part);
    if (payload != nullptr) payload->append(part);
    position += std::ssize(part);
    left -= std::ssize(part);
  }
  GW_ASSIGN_OR_RETURN(const std::string_view digest,
                      Fetch(position, kRecordDigestBytes));
  if (digest != hash.Digest()) return Found::kInvalid;
  offset_ += record->record_bytes();
  return Found::kRecord;
}

absl::StatusOr<int64_t> SegmentReader::LaterDurableOffset() {
  const std::string magic = RecordMagic(header_);
  int64_t largest = -1;
  int64_t position = FilePosition(offset_) + 1;
  while (position + kRecordHeaderBytes <= file_bytes_) {
    GW_ASSIGN_OR_RETURN(const std::string_view window,
                        Fetch(position, kWindowBytes));
    if (std::ssize(window) < kRecordHeaderBytes) break;
    // A header that does not end in this window begins the next one.
    const int64_t next = std::ssize(window) - kRecordHeaderBytes + 1;
    for (size_t at = window.find(magic);
         at != std::string_view::npos && static_cast<int64_t>(at) < next;
         at = window.find(magic, at + 1)) {
      const int64_t offset = header_.begin - kSegmentHeaderBytes + position +
                             static_cast<int64_t>(at);
      RecordHeader record;
      int version = 0;
      const HeaderState state =
          DecodeRecordHeader(window.substr(at, kRecordHeaderBytes), header_,
                             offset, &record, &version);
      if (state == HeaderState::kNewerVersion) return NewerVersion(version);
      if (state == HeaderState::kValid) {
        largest = std::max(largest, record.durable_offset);
      }
    }
    position += next;
  }
  return largest;
}

}  // namespace gradwire
