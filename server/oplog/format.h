// SPDX-License-Identifier: Apache-2.0
// The bytes of the op-log: segment names, segment headers, record headers.
// Table and reasons: docs/oplog.md. Numbers are little-endian.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace gradwire {

inline constexpr int kOplogVersion = 1;
inline constexpr int64_t kSegmentHeaderBytes = 40;
inline constexpr int64_t kRecordHeaderBytes = 56;
inline constexpr int64_t kRecordDigestBytes = 16;
// A record is read in one piece.
inline constexpr int64_t kMaxPayloadBytes = int64_t{1} << 32;

enum class OplogType : uint16_t {
  kOp = 1,
  kDone = 2,
  kFailed = 3,
  kCheckpointRef = 4,
  kEpoch = 5,  // written by the log: the first of every segment that Open began
  kSeal = 6,   // written by the log: the last of a segment that was full
};

// What a header is, by its own checksum.
enum class HeaderState { kValid, kInvalid, kNewerVersion };

struct SegmentHeader {
  int64_t epoch = 0;
  int64_t begin = 0;  // log offset of its first record
  uint32_t tag = 0;   // random: second half of its records' magic
  uint32_t seed = 0;  // random: of its record headers' checksums
};

struct RecordHeader {
  OplogType type = OplogType::kOp;
  int64_t payload_bytes = 0;
  int64_t handle = 0;
  int64_t seq_id = 0;
  int64_t epoch = 0;
  int64_t durable_offset = 0;

  int64_t record_bytes() const {
    return kRecordHeaderBytes + payload_bytes + kRecordDigestBytes;
  }
};

// "<epoch>-<begin>.oplog", 19 digits each: names sort as the log runs.
std::string SegmentName(int64_t epoch, int64_t begin);
// Epoch and begin; nullopt for any other name.
std::optional<SegmentHeader> ParseSegmentName(std::string_view name);

std::string EncodeSegmentHeader(const SegmentHeader& header);
// `version` is set unless the state is kInvalid.
HeaderState DecodeSegmentHeader(std::string_view bytes, SegmentHeader* header,
                                int* version);

// With which every record of a segment begins.
std::string RecordMagic(const SegmentHeader& segment);
// `offset` is the log offset of the record: the checksum covers it, so that a
// record is valid in its place only.
std::string EncodeRecordHeader(const RecordHeader& header,
                               const SegmentHeader& segment, int64_t offset);
// Invalid is also what the writer never writes: an unknown type, another epoch
// than the segment's, a length out of range, a durable_offset above `offset`.
HeaderState DecodeRecordHeader(std::string_view bytes,
                               const SegmentHeader& segment, int64_t offset,
                               RecordHeader* header, int* version);

}  // namespace gradwire
