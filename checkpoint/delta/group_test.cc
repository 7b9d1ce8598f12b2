// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/group.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "checkpoint/delta/delta_testing.h"
#include "checkpoint/delta/scan.h"
#include "checkpoint/delta/value_code.h"

namespace gradwire {
namespace {

constexpr int64_t kChunk = kChunkElements;

GroupShape Bf16(int64_t n) {
  GroupShape shape;
  shape.num_elements = n;
  shape.element_bytes = 2;
  shape.floats16 = true;
  return shape;
}

std::vector<uint16_t> RandomBits(int64_t n, std::mt19937& random) {
  std::vector<uint16_t> bits(static_cast<size_t>(n));
  for (uint16_t& b : bits) b = static_cast<uint16_t>(random());
  return bits;
}

const uint8_t* Bytes(const EncodedGroup& group) {
  return reinterpret_cast<const uint8_t*>(group.payload.data());
}

// Encodes, decodes, undoes; returns what was encoded.
EncodedGroup ExpectRoundTrip(const std::vector<uint16_t>& before,
                             const std::vector<uint16_t>& after,
                             GroupEncoder::Options options = {}) {
  const GroupShape shape = Bf16(static_cast<int64_t>(before.size()));
  GroupEncoder encoder;
  EncodedGroup group =
      encoder.Encode(shape, before.data(), after.data(), options);
  GroupDecoder decoder;
  std::vector<uint16_t> weights = before;
  ByteBuffer saved;
  EXPECT_EQ(decoder.Decode(shape, group.rows, group.group, Bytes(group),
                           {true, &saved}, weights.data()),
            GroupResult::kOk);
  EXPECT_EQ(weights, after);
  decoder.Undo(shape, group.rows, group.group, Bytes(group), saved.data(),
               weights.data());
  EXPECT_EQ(weights, before);
  return group;
}

TEST(GroupTest, ScanFindsWhatPlainLoopsFind) {
  std::mt19937 random(1);
  for (const int64_t n : {int64_t{1}, int64_t{31}, int64_t{63}, int64_t{64},
                          int64_t{65}, int64_t{1000}, kChunk - 1, kChunk}) {
    for (const double density : {0.0, 0.001, 0.1, 0.5, 1.0}) {
      const std::vector<uint16_t> before = RandomBits(n, random);
      std::vector<uint16_t> after = before;
      ChangeSome(after.data(), n, density, random, 0.5);
      const auto room = static_cast<size_t>(n + kScanSlack);
      std::vector<uint16_t> positions(room), z(room), z_at(room);
      std::vector<uint64_t> bitmap(room / 64 + 1);
      const int64_t count =
          FindChanges(before.data(), after.data(), n, bitmap.data());
      ASSERT_EQ(TakePositions(bitmap.data(), n, 0, positions.data()), count);
      std::vector<uint16_t> same_positions(room);
      TakeChanges(before.data(), after.data(), n, bitmap.data(),
                  same_positions.data(), z.data());
      for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
        ASSERT_EQ(same_positions[i], positions[i]);
      }
      TakeChanges(before.data(), after.data(), n, bitmap.data(), nullptr,
                  z.data());
      TakeChangesAt(before.data(), after.data(), positions.data(), count,
                    z_at.data());
      int64_t expected = 0;
      for (int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<size_t>(i);
        const bool changed = before[at] != after[at];
        ASSERT_EQ(bitmap[at / 64] >> (i % 64) & 1, changed) << i;
        if (!changed) continue;
        ASSERT_EQ(positions[static_cast<size_t>(expected)], i);
        ASSERT_EQ(z[static_cast<size_t>(expected)],
                  EncodeChange(before[at], after[at]));
        ASSERT_EQ(z_at[static_cast<size_t>(expected)],
                  z[static_cast<size_t>(expected)]);
        ++expected;
      }
      ASSERT_EQ(count, expected);
    }
  }
}

TEST(GroupTest, EveryDensityAndSizeComesBack) {
  std::mt19937 random(2);
  for (const int64_t n : {int64_t{1}, int64_t{2}, int64_t{63}, int64_t{4097},
                          kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 5}) {
    for (const double density :
         {0.0, 0.0005, 0.01, 0.1, 0.149, 0.3, 0.59, 0.7, 1.0}) {
      const std::vector<uint16_t> before = RandomBits(n, random);
      std::vector<uint16_t> after = before;
      ChangeSome(after.data(), n, density, random);
      ExpectRoundTrip(before, after);
      ExpectRoundTrip(before, after, {true, false, {}});
    }
  }
}

TEST(GroupTest, TheMethodGoesByTheDensity) {
  const std::vector<uint16_t> before(static_cast<size_t>(kChunk), 0x3f80);
  const std::vector<std::pair<int64_t, ChunkMethod>> cases = {
      {0, ChunkMethod::kUnchanged},  {1, ChunkMethod::kGaps},
      {9830, ChunkMethod::kGaps},    {9831, ChunkMethod::kBitmap},
      {39321, ChunkMethod::kBitmap}, {39322, ChunkMethod::kDense},
      {65535, ChunkMethod::kDense},  {65536, ChunkMethod::kDense}};
  for (const auto& [changed, method] : cases) {
    std::vector<uint16_t> after = before;
    for (int64_t i = 0; i < changed; ++i) ++after[static_cast<size_t>(i)];
    const EncodedGroup group = ExpectRoundTrip(before, after);
    EXPECT_EQ(group.rows[0].method, method) << changed;
    EXPECT_EQ(group.rows[0].changed, changed);
  }
}

TEST(GroupTest, GapsContinueAt255) {
  for (const int64_t gap :
       {0, 1, 253, 254, 255, 256, 509, 510, 511, 764, 765, 766, 65534, 65535}) {
    for (const int64_t second : {int64_t{-1}, gap + 1, gap + 256, gap + 511}) {
      std::vector<uint16_t> before(static_cast<size_t>(kChunk), 0x3f80);
      std::vector<uint16_t> after = before;
      ++after[static_cast<size_t>(gap)];
      int64_t extensions = gap / 255;
      if (second > 0 && second < kChunk) {
        ++after[static_cast<size_t>(second)];
        extensions += (second - gap - 1) / 255;
      }
      const EncodedGroup group = ExpectRoundTrip(before, after);
      EXPECT_EQ(group.rows[0].gap_extensions, extensions) << gap;
    }
  }
}

TEST(GroupTest, GapsRestartInEveryChunk) {
  std::vector<uint16_t> before(static_cast<size_t>(2 * kChunk), 0x3f80);
  std::vector<uint16_t> after = before;
  ++after[0];
  ++after[static_cast<size_t>(kChunk)];
  const EncodedGroup group = ExpectRoundTrip(before, after, {true, false, {}});
  EXPECT_EQ(group.rows[0].gap_extensions, 0);
  EXPECT_EQ(group.payload.substr(0, 2), std::string(2, '\0'));
  EXPECT_EQ(group.rows[1].flags, kFlagFast);
}

TEST(GroupTest, ValuesEscapeAt255) {
  // z is 2 d for d > 0 and -2 d - 1 for d < 0.
  const std::vector<std::pair<int, int>> cases = {
      {127, 0}, {128, 1}, {-127, 0}, {-128, 1}, {20000, 1}, {-30000, 1}};
  for (const double density : {0.1, 0.4}) {
    for (const auto& [d, escapes] : cases) {
      std::vector<uint16_t> before(10, 0x0000);
      std::vector<uint16_t> after = before;
      const auto changed = static_cast<int32_t>(10 * density);
      for (int32_t i = 0; i < changed; ++i) {
        after[static_cast<size_t>(i)] =
            FromOrderKey(static_cast<uint16_t>(OrderKey(0) + d));
      }
      const EncodedGroup group = ExpectRoundTrip(before, after);
      EXPECT_EQ(group.rows[0].escapes, escapes * changed) << d;
    }
  }
}

TEST(GroupTest, FreshAndForcedChunksAreRaw) {
  std::mt19937 random(3);
  const std::vector<uint16_t> before = RandomBits(2 * kChunk + 9, random);
  std::vector<uint16_t> after = before;
  ++after[static_cast<size_t>(kChunk)];
  const EncodedGroup group =
      ExpectRoundTrip(before, after, {false, false, {true, false, true}});
  EXPECT_EQ(group.rows[0].method, ChunkMethod::kRaw);
  EXPECT_EQ(group.rows[1].method, ChunkMethod::kGaps);
  EXPECT_EQ(group.rows[2].method, ChunkMethod::kRaw);
  const GroupShape shape = Bf16(2 * kChunk + 9);
  GroupEncoder encoder;
  const EncodedGroup fresh =
      encoder.Encode(shape, nullptr, after.data(), {false, true, {}});
  std::vector<uint16_t> weights(after.size());
  GroupDecoder decoder;
  EXPECT_EQ(decoder.Decode(shape, fresh.rows, fresh.group, Bytes(fresh), {},
                           weights.data()),
            GroupResult::kOk);
  EXPECT_EQ(weights, after);
}

TEST(GroupTest, AWrongBaseIsFoundAndLeftAlone) {
  std::mt19937 random(4);
  const int64_t n = 3 * kChunk;
  const GroupShape shape = Bf16(n);
  for (int round = 0; round < 40; ++round) {
    const std::vector<uint16_t> before = RandomBits(n, random);
    std::vector<uint16_t> after = before;
    ChangeSome(after.data(), n, round % 2 ? 0.01 : 0.4, random);
    GroupEncoder encoder;
    const EncodedGroup group =
        encoder.Encode(shape, before.data(), after.data(),
                       {false, false, {false, true, false}});
    std::vector<uint16_t> wrong = before;
    // In a chunk that is not replaced.
    const auto at = static_cast<size_t>(random() % kChunk + 2 * kChunk);
    wrong[at] = static_cast<uint16_t>(wrong[at] ^ 1 << random() % 16);
    std::vector<uint16_t> weights = wrong;
    GroupDecoder decoder;
    ByteBuffer saved;
    EXPECT_EQ(decoder.Decode(shape, group.rows, group.group, Bytes(group),
                             {true, &saved}, weights.data()),
              GroupResult::kMismatch);
    EXPECT_EQ(weights, wrong);
  }
}

// Whatever the streams hold, nothing outside is touched and failure undoes.
TEST(GroupTest, RandomStreamsAreRefused) {
  std::mt19937 random(5);
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    const int64_t n = 1 + static_cast<int64_t>(random() % 300);
    const GroupShape shape = Bf16(n);
    ChunkRow row;
    row.method = static_cast<ChunkMethod>(random() % 5);
    row.changed = row.method == ChunkMethod::kUnchanged ? 0
                  : row.method == ChunkMethod::kRaw
                      ? static_cast<int32_t>(n)
                      : static_cast<int32_t>(1 + random() % n);
    if (row.method == ChunkMethod::kGaps) {
      row.gap_extensions = static_cast<int32_t>(random() % (n / 255 + 1));
    }
    if (row.method == ChunkMethod::kGaps ||
        row.method == ChunkMethod::kBitmap) {
      row.escapes = static_cast<int32_t>(random() % 2);
    }
    const auto sizes = StreamBytes(shape, {&row, 1});
    DeltaGroup group;
    group.chunks = 1;
    std::string payload;
    for (size_t s = 0; s < kPlaneStream + 2; ++s) {
      group.sizes.push_back(sizes[s]);
      for (int64_t i = 0; i < sizes[s]; ++i) {
        payload.push_back(static_cast<char>(random() % 4 ? random() % 3
                                                         : 250 + random() % 6));
      }
    }
    const std::vector<uint16_t> before = RandomBits(n, random);
    std::vector<uint16_t> weights = before;
    GroupDecoder decoder;
    ByteBuffer saved;
    const GroupResult result =
        decoder.Decode(shape, {&row, 1}, group,
                       reinterpret_cast<const uint8_t*>(payload.data()),
                       {true, &saved}, weights.data());
    ASSERT_NE(result, GroupResult::kOk);
    refused += result == GroupResult::kCorrupt;
    ASSERT_EQ(weights, before);
  }
  EXPECT_GT(refused, 200);
}

TEST(GroupTest, BitsBehindTheBitmapAreRefused) {
  std::vector<uint16_t> before(13, 0x3f80), after = before;
  for (size_t i = 0; i < 6; ++i) ++after[i];
  const GroupShape shape = Bf16(13);
  GroupEncoder encoder;
  EncodedGroup group =
      encoder.Encode(shape, before.data(), after.data(), {true, false, {}});
  ASSERT_EQ(group.rows[0].method, ChunkMethod::kBitmap);
  // As many ones, the last of them outside.
  group.payload[0] = '\x1f';
  group.payload[1] = '\x20';
  std::vector<uint16_t> weights = before;
  GroupDecoder decoder;
  EXPECT_EQ(decoder.Decode(shape, group.rows, group.group, Bytes(group), {},
                           weights.data()),
            GroupResult::kCorrupt);
  EXPECT_EQ(weights, before);
}

// Every vector target of this machine writes the same bytes.
TEST(GroupTest, TargetsAgree) {
  std::mt19937 random(6);
  const int64_t n = 4 * kChunk + 77;
  const std::vector<uint16_t> before = RandomBits(n, random);
  std::vector<uint16_t> after = before;
  ChangeSome(after.data(), kChunk, 0.01, random);
  ChangeSome(after.data() + kChunk, kChunk, 0.1, random);
  ChangeSome(after.data() + 2 * kChunk, kChunk, 0.3, random);
  ChangeSome(after.data() + 3 * kChunk, kChunk + 77, 0.8, random);
  const EncodedGroup expected = ExpectRoundTrip(before, after);
  const int64_t all = hwy::SupportedTargets();
  for (int64_t left = all; left != 0; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    const EncodedGroup group = ExpectRoundTrip(before, after);
    EXPECT_EQ(group.payload, expected.payload) << left;
    EXPECT_EQ(group.rows, expected.rows) << left;
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(ChunkTableTest, RowsComeBack) {
  std::vector<ChunkRow> rows(3);
  rows[0] = {ChunkMethod::kGaps, kFlagFast, 65536, 0, 65535, 0x89abcdef};
  rows[1] = {ChunkMethod::kUnchanged, 0, 0, 0, 0, 7};
  rows[2] = {ChunkMethod::kRaw, 0, 1, 0, 0, 0xffffffff};
  ByteBuffer planes;
  WriteChunkTable(rows, planes);
  ASSERT_EQ(planes.size(), 36);
  std::vector<ChunkRow> back;
  ASSERT_TRUE(ReadChunkTable(planes.data(), 2 * kChunk + 1, back));
  EXPECT_EQ(back, rows);
}

TEST(ChunkTableTest, ImpossibleRowsAreRefused) {
  const std::vector<std::pair<const char*, ChunkRow>> cases = {
      {"method", {static_cast<ChunkMethod>(5), 0, 1, 0, 0, 0}},
      {"flag", {ChunkMethod::kGaps, 2, 1, 0, 0, 0}},
      {"changes", {ChunkMethod::kGaps, 0, 301, 0, 0, 0}},
      {"changes of none", {ChunkMethod::kUnchanged, 0, 2, 0, 0, 0}},
      {"escapes", {ChunkMethod::kBitmap, 0, 3, 0, 4, 0}},
      {"escapes of dense", {ChunkMethod::kDense, 0, 3, 0, 1, 0}},
      {"extensions", {ChunkMethod::kGaps, 0, 3, 2, 0, 0}},
      {"extensions of bitmap", {ChunkMethod::kBitmap, 0, 3, 1, 0, 0}},
      {"raw in part", {ChunkMethod::kRaw, 0, 299, 0, 0, 0}}};
  for (const auto& [what, row] : cases) {
    ByteBuffer planes;
    WriteChunkTable({row}, planes);
    std::vector<ChunkRow> rows;
    EXPECT_FALSE(ReadChunkTable(planes.data(), 300, rows)) << what;
  }
}

}  // namespace
}  // namespace gradwire
