// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/interop.h"

#include <gtest/gtest.h>
#include <zstd.h>

#include <random>
#include <string>
#include <vector>

#include "checkpoint/delta/delta_testing.h"
#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

constexpr int64_t kChunk = kChunkElements;

struct Pair {
  Pair() {
    std::mt19937 random(1);
    before.Add({"w", "BF16", {2, kChunk}}, FloatBytes{random});
    before.Add({"kept", "BF16", {5}}, FloatBytes{random});
    before.Add({"norm", "F32", {50}}, FloatBytes{random});
    after = before;
    ChangeSome(after.data<uint16_t>(0), 2 * kChunk, 0.02, random);
    after.data(2)[4 * 49 + 1] ^= 1;
  }
  TestWeights before, after;
};

TEST(InteropTest, XorComesBack) {
  const Pair pair;
  const auto file = EncodeXorDelta(pair.before.views(), pair.after.views());
  ASSERT_TRUE(file.ok()) << file.status();
  const auto header = ParseSafetensors(*file, 1 << 20);
  ASSERT_TRUE(header.ok()) << header.status();
  ASSERT_EQ(header->entries.size(), 2u);
  TestWeights weights = pair.before;
  for (const size_t i : {size_t{0}, size_t{2}}) {
    const SafetensorsEntry& entry = header->entries.at(weights.info(i).name);
    std::vector<uint8_t> difference(static_cast<size_t>(weights.bytes(i)));
    ASSERT_EQ(ZSTD_decompress(difference.data(), difference.size(),
                              file->data() + entry.offset,
                              static_cast<size_t>(entry.bytes)),
              difference.size());
    for (size_t j = 0; j < difference.size(); ++j) {
      weights.data(i)[j] ^= difference[j];
    }
  }
  EXPECT_TRUE(weights == pair.after);
}

TEST(InteropTest, SparseComesBack) {
  const Pair pair;
  const auto file = EncodeSparseDelta(pair.before.views(), pair.after.views());
  ASSERT_TRUE(file.ok()) << file.status();
  const auto header = ParseSafetensors(*file, 1 << 20);
  ASSERT_TRUE(header.ok()) << header.status();
  ASSERT_EQ(header->entries.size(), 4u);
  TestWeights weights = pair.before;
  for (const size_t i : {size_t{0}, size_t{2}}) {
    const std::string& name = weights.info(i).name;
    const SafetensorsEntry& at = header->entries.at(name + ".indices");
    const SafetensorsEntry& values = header->entries.at(name + ".values");
    EXPECT_EQ(at.dtype, "I32");
    EXPECT_EQ(values.dtype, weights.info(i).dtype);
    const int64_t count = at.bytes / 4, element = values.bytes / count;
    for (int64_t j = 0; j < count; ++j) {
      int32_t index;
      std::memcpy(&index, file->data() + at.offset + 4 * j, 4);
      std::memcpy(weights.data(i) + index * element,
                  file->data() + values.offset + j * element,
                  static_cast<size_t>(element));
    }
  }
  EXPECT_TRUE(weights == pair.after);
}

TEST(InteropTest, SparseNeedsOldValues) {
  const Pair pair;
  EXPECT_EQ(ReasonOf(EncodeSparseDelta({}, pair.after.views()).status()),
            "DELTA_INVALID");
  EXPECT_TRUE(EncodeXorDelta({}, pair.after.views()).ok());
}

}  // namespace
}  // namespace gradwire
