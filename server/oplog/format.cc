// SPDX-License-Identifier: Apache-2.0
#include "server/oplog/format.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "base/crc32c.h"

namespace gradwire {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr char kSegmentMagic[] = "GWOPLOG\n";
constexpr char kRecordMagic[] = "GWOR";
constexpr std::string_view kSuffix = ".oplog";
constexpr size_t kDigits = 19;

// Where the checksums stand; they cover everything around them.
constexpr size_t kSegmentCrc = 20;
constexpr size_t kRecordCrc = 12;
constexpr size_t kCrcBytes = 4;

template <typename T>
void Put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

template <typename T>
T Get(std::string_view bytes, size_t at) {
  T value;
  memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

uint32_t CrcAround(std::string_view bytes, size_t crc_at, uint32_t seed) {
  const std::string_view rest = bytes.substr(crc_at + kCrcBytes);
  const uint32_t crc = Crc32c(bytes.data(), static_cast<int64_t>(crc_at), seed);
  return Crc32c(rest.data(), std::ssize(rest), crc);
}

uint32_t RecordCrc(std::string_view bytes, const SegmentHeader& segment,
                   int64_t offset) {
  return CrcAround(bytes, kRecordCrc,
                   Crc32c(&offset, sizeof(offset), segment.seed));
}

// -1 unless all of `digits` are.
int64_t ParseDigits(std::string_view digits) {
  int64_t value = 0;
  for (const char c : digits) {
    if (c < '0' || c > '9') return -1;
    // 19 digits may be more than an int64_t holds.
    if (__builtin_mul_overflow(value, int64_t{10}, &value) ||
        __builtin_add_overflow(value, int64_t{c - '0'}, &value)) {
      return -1;
    }
  }
  return value;
}

}  // namespace

std::string SegmentName(int64_t epoch, int64_t begin) {
  char name[64];
  std::snprintf(name, sizeof(name), "%019lld-%019lld.oplog",
                static_cast<long long>(epoch), static_cast<long long>(begin));
  return name;
}

std::optional<SegmentHeader> ParseSegmentName(std::string_view name) {
  if (name.size() != 2 * kDigits + 1 + kSuffix.size() || name[kDigits] != '-' ||
      name.substr(2 * kDigits + 1) != kSuffix) {
    return std::nullopt;
  }
  SegmentHeader header;
  header.epoch = ParseDigits(name.substr(0, kDigits));
  header.begin = ParseDigits(name.substr(kDigits + 1, kDigits));
  if (header.epoch < 0 || header.begin < 0) return std::nullopt;
  return header;
}

std::string EncodeSegmentHeader(const SegmentHeader& header) {
  std::string bytes(kSegmentMagic);
  Put(bytes, uint32_t{kOplogVersion});
  Put(bytes, header.tag);
  Put(bytes, header.seed);
  Put(bytes, uint32_t{0});
  Put(bytes, header.epoch);
  Put(bytes, header.begin);
  const uint32_t crc = CrcAround(bytes, kSegmentCrc, 0);
  memcpy(bytes.data() + kSegmentCrc, &crc, sizeof(crc));
  return bytes;
}

HeaderState DecodeSegmentHeader(std::string_view bytes, SegmentHeader* header,
                                int* version) {
  if (std::ssize(bytes) != kSegmentHeaderBytes ||
      !bytes.starts_with(kSegmentMagic) ||
      Get<uint32_t>(bytes, kSegmentCrc) != CrcAround(bytes, kSegmentCrc, 0)) {
    return HeaderState::kInvalid;
  }
  *version = static_cast<int>(Get<uint32_t>(bytes, 8));
  header->tag = Get<uint32_t>(bytes, 12);
  header->seed = Get<uint32_t>(bytes, 16);
  header->epoch = Get<int64_t>(bytes, 24);
  header->begin = Get<int64_t>(bytes, 32);
  return *version == kOplogVersion ? HeaderState::kValid
                                   : HeaderState::kNewerVersion;
}

std::string RecordMagic(const SegmentHeader& segment) {
  std::string magic(kRecordMagic);
  Put(magic, segment.tag);
  return magic;
}

std::string EncodeRecordHeader(const RecordHeader& header,
                               const SegmentHeader& segment, int64_t offset) {
  std::string bytes = RecordMagic(segment);
  Put(bytes, uint16_t{kOplogVersion});
  Put(bytes, static_cast<uint16_t>(header.type));
  Put(bytes, uint32_t{0});
  Put(bytes, header.payload_bytes);
  Put(bytes, header.handle);
  Put(bytes, header.seq_id);
  Put(bytes, header.epoch);
  Put(bytes, header.durable_offset);
  const uint32_t crc = RecordCrc(bytes, segment, offset);
  memcpy(bytes.data() + kRecordCrc, &crc, sizeof(crc));
  return bytes;
}

HeaderState DecodeRecordHeader(std::string_view bytes,
                               const SegmentHeader& segment, int64_t offset,
                               RecordHeader* header, int* version) {
  if (std::ssize(bytes) != kRecordHeaderBytes ||
      !bytes.starts_with(RecordMagic(segment)) ||
      Get<uint32_t>(bytes, kRecordCrc) != RecordCrc(bytes, segment, offset)) {
    return HeaderState::kInvalid;
  }
  *version = Get<uint16_t>(bytes, 8);
  if (*version != kOplogVersion) return HeaderState::kNewerVersion;
  const uint16_t type = Get<uint16_t>(bytes, 10);
  header->type = static_cast<OplogType>(type);
  header->payload_bytes = Get<int64_t>(bytes, 16);
  header->handle = Get<int64_t>(bytes, 24);
  header->seq_id = Get<int64_t>(bytes, 32);
  header->epoch = Get<int64_t>(bytes, 40);
  header->durable_offset = Get<int64_t>(bytes, 48);
  const bool possible =
      type >= static_cast<uint16_t>(OplogType::kOp) &&
      type <= static_cast<uint16_t>(OplogType::kSeal) &&
      header->payload_bytes >= 0 && header->payload_bytes <= kMaxPayloadBytes &&
      header->epoch == segment.epoch && header->durable_offset >= 0 &&
      header->durable_offset <= offset;
  return possible ? HeaderState::kValid : HeaderState::kInvalid;
}

}  // namespace gradwire
