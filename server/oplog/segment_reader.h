// SPDX-License-Identifier: Apache-2.0
// One segment, record by record, with every checksum verified and memory
// bounded by the largest record that is asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "server/oplog/format.h"

namespace gradwire {

// Not for use by several threads.
class SegmentReader {
 public:
  enum class Found {
    kRecord,
    kEnd,      // the file ends here
    kInvalid,  // the file goes on, but not with a record
  };

  // Reads the header. `name` is that of a file in `directory`.
  // Errors: FAILED_PRECONDITION STATE_VERSION (have, need); the file system's.
  static absl::StatusOr<std::unique_ptr<SegmentReader>> Open(
      FileSystem& files, const std::string& directory, const std::string& name);

  // Whether the header is what the name says. If not, the rest is of no use.
  bool valid() const { return valid_; }
  const SegmentHeader& header() const { return header_; }
  int64_t file_bytes() const { return file_bytes_; }
  // Log offset of what Next looks at.
  int64_t offset() const { return offset_; }
  // Where a record is known to begin. REQUIRES: not before header().begin.
  void Seek(int64_t offset) { offset_ = offset; }

  // Looks at the next record, and passes it if it is one. Its payload is
  // verified in any case, and kept if `payload` is not null.
  // Errors: STATE_VERSION; the file system's. offset() is then unchanged.
  absl::StatusOr<Found> Next(RecordHeader* record, std::string* payload);

  // The largest durable_offset of the record headers behind offset(), wherever
  // they are; -1 if there are none.
  absl::StatusOr<int64_t> LaterDurableOffset();

 private:
  SegmentReader() = default;

  int64_t FilePosition(int64_t offset) const {
    return kSegmentHeaderBytes + offset - header_.begin;
  }
  // Up to `bytes` of the file; fewer where it ends. Valid until the next call.
  absl::StatusOr<std::string_view> Fetch(int64_t position, int64_t bytes);

  std::unique_ptr<File> file_;
  SegmentHeader header_;
  bool valid_ = false;
  int64_t file_bytes_ = 0;
  int64_t offset_ = 0;
  std::string window_;
  int64_t window_begin_ = 0;
};

}  // namespace gradwire
