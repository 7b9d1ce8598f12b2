// SPDX-License-Identifier: Apache-2.0
#include "server/oplog/format.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "server/oplog/payload_hash.h"

namespace gradwire {
namespace {

constexpr SegmentHeader kSegment = {
    .epoch = 7, .begin = 1000, .tag = 0x11223344, .seed = 0x55667788};
constexpr RecordHeader kRecord = {.type = OplogType::kDone,
                                  .payload_bytes = 5,
                                  .handle = 3,
                                  .seq_id = 4,
                                  .epoch = 7,
                                  .durable_offset = 900};
constexpr int64_t kOffset = 1234;

HeaderState Decode(const std::string& bytes, int64_t offset = kOffset,
                   const SegmentHeader& segment = kSegment) {
  RecordHeader header;
  int version = 0;
  return DecodeRecordHeader(bytes, segment, offset, &header, &version);
}

TEST(SegmentNameTest, GoesThereAndBack) {
  EXPECT_EQ(SegmentName(7, 1000),
            "0000000000000000007-0000000000000001000.oplog");
  const int64_t most = std::numeric_limits<int64_t>::max();
  for (const int64_t epoch : {int64_t{1}, most}) {
    for (const int64_t begin : {int64_t{0}, most}) {
      const auto header = ParseSegmentName(SegmentName(epoch, begin));
      ASSERT_TRUE(header.has_value());
      EXPECT_EQ(header->epoch, epoch);
      EXPECT_EQ(header->begin, begin);
    }
  }
}

TEST(SegmentNameTest, OthersAreNone) {
  const std::string good = SegmentName(7, 1000);
  for (const std::string& bad :
       {std::string(), std::string("lost+found"), good + "x", "0" + good,
        good.substr(0, good.size() - 1), "-" + good.substr(1),
        "9999999999999999999" + good.substr(19),
        good.substr(0, 19) + "_" + good.substr(20)}) {
    EXPECT_FALSE(ParseSegmentName(bad).has_value()) << bad;
  }
}

TEST(SegmentHeaderTest, GoesThereAndBack) {
  const std::string bytes = EncodeSegmentHeader(kSegment);
  ASSERT_EQ(std::ssize(bytes), kSegmentHeaderBytes);
  SegmentHeader header;
  int version = 0;
  ASSERT_EQ(DecodeSegmentHeader(bytes, &header, &version), HeaderState::kValid);
  EXPECT_EQ(version, kOplogVersion);
  EXPECT_EQ(header.epoch, 7);
  EXPECT_EQ(header.begin, 1000);
  EXPECT_EQ(header.tag, kSegment.tag);
  EXPECT_EQ(header.seed, kSegment.seed);
}

TEST(SegmentHeaderTest, AnyOtherBitIsNone) {
  const std::string bytes = EncodeSegmentHeader(kSegment);
  SegmentHeader header;
  int version = 0;
  for (size_t i = 0; i < bytes.size() * 8; ++i) {
    std::string bad = bytes;
    bad[i / 8] = static_cast<char>(bad[i / 8] ^ (1 << (i % 8)));
    EXPECT_EQ(DecodeSegmentHeader(bad, &header, &version),
              HeaderState::kInvalid);
  }
  EXPECT_EQ(DecodeSegmentHeader(bytes.substr(1), &header, &version),
            HeaderState::kInvalid);
  EXPECT_EQ(DecodeSegmentHeader("", &header, &version), HeaderState::kInvalid);
}

// The bytes of docs/oplog.md; the checksums are what they are.
TEST(RecordHeaderTest, HasTheDocumentedBytes) {
  std::string bytes = EncodeRecordHeader(kRecord, kSegment, kOffset);
  ASSERT_EQ(std::ssize(bytes), kRecordHeaderBytes);
  bytes.replace(12, 4, "CRC.");
  const std::string zeros(7, '\0');
  EXPECT_EQ(bytes, std::string("GWOR\x44\x33\x22\x11\x01\x00\x02\x00"
                               "CRC.",
                               16) +
                       "\x05" + zeros + "\x03" + zeros + "\x04" + zeros +
                       "\x07" + zeros + "\x84\x03" + zeros.substr(1));
}

TEST(RecordHeaderTest, GoesThereAndBack) {
  RecordHeader header;
  int version = 0;
  ASSERT_EQ(DecodeRecordHeader(EncodeRecordHeader(kRecord, kSegment, kOffset),
                               kSegment, kOffset, &header, &version),
            HeaderState::kValid);
  EXPECT_EQ(header.type, OplogType::kDone);
  EXPECT_EQ(header.payload_bytes, 5);
  EXPECT_EQ(header.handle, 3);
  EXPECT_EQ(header.seq_id, 4);
  EXPECT_EQ(header.epoch, 7);
  EXPECT_EQ(header.durable_offset, 900);
  EXPECT_EQ(header.record_bytes(), 56 + 5 + 16);
}

TEST(RecordHeaderTest, IsValidInItsPlaceAndSegmentOnly) {
  const std::string bytes = EncodeRecordHeader(kRecord, kSegment, kOffset);
  EXPECT_EQ(Decode(bytes), HeaderState::kValid);
  EXPECT_EQ(Decode(bytes, kOffset + 1), HeaderState::kInvalid);
  SegmentHeader other = kSegment;
  other.seed ^= 1;
  EXPECT_EQ(Decode(bytes, kOffset, other), HeaderState::kInvalid);
  other = kSegment;
  other.tag ^= 1;
  EXPECT_EQ(Decode(bytes, kOffset, other), HeaderState::kInvalid);
}

TEST(RecordHeaderTest, AnyOtherBitIsNone) {
  const std::string bytes = EncodeRecordHeader(kRecord, kSegment, kOffset);
  for (size_t i = 0; i < bytes.size() * 8; ++i) {
    std::string bad = bytes;
    bad[i / 8] = static_cast<char>(bad[i / 8] ^ (1 << (i % 8)));
    EXPECT_EQ(Decode(bad), HeaderState::kInvalid) << i;
  }
  EXPECT_EQ(Decode(bytes.substr(1)), HeaderState::kInvalid);
}

TEST(RecordHeaderTest, WhatIsNeverWrittenIsNone) {
  const auto with = [](auto change) {
    RecordHeader header = kRecord;
    change(header);
    return Decode(EncodeRecordHeader(header, kSegment, kOffset));
  };
  EXPECT_EQ(with([](RecordHeader& h) { h.payload_bytes = -1; }),
            HeaderState::kInvalid);
  EXPECT_EQ(
      with([](RecordHeader& h) { h.payload_bytes = kMaxPayloadBytes + 1; }),
      HeaderState::kInvalid);
  EXPECT_EQ(with([](RecordHeader& h) { h.epoch = 8; }), HeaderState::kInvalid);
  EXPECT_EQ(with([](RecordHeader& h) { h.durable_offset = -1; }),
            HeaderState::kInvalid);
  EXPECT_EQ(with([](RecordHeader& h) { h.durable_offset = kOffset + 1; }),
            HeaderState::kInvalid);
  EXPECT_EQ(with([](RecordHeader& h) { h.durable_offset = kOffset; }),
            HeaderState::kValid);
  for (const int type : {0, 7, 65535}) {
    EXPECT_EQ(
        with([&](RecordHeader& h) { h.type = static_cast<OplogType>(type); }),
        HeaderState::kInvalid);
  }
}

TEST(PayloadHashTest, PartsMakeNoDifference) {
  PayloadHash whole, parts;
  whole.Update("per-token gradients");
  parts.Update("per-token ");
  parts.Update("");
  parts.Update("gradients");
  EXPECT_EQ(whole.Digest(), parts.Digest());
  EXPECT_EQ(std::ssize(whole.Digest()), kRecordDigestBytes);
  // The published value of XXH3-128 of nothing, in canonical order.
  EXPECT_EQ(PayloadHash().Digest(),
            "\x99\xaa\x06\xd3\x01\x47\x98\xd8\x60\x01\xc3\x24\x46\x8d\x49\x7f");
}

}  // namespace
}  // namespace gradwire
