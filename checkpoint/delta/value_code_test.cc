// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/value_code.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace gradwire {
namespace {

constexpr int kPatterns = 1 << 16;

// With these three, every pair comes back: differences modulo 2^16 are a group.
TEST(ValueCodeTest, KeysAreABijection) {
  std::set<uint16_t> keys;
  for (int x = 0; x < kPatterns; ++x) {
    const uint16_t bits = static_cast<uint16_t>(x);
    keys.insert(OrderKey(bits));
    ASSERT_EQ(FromOrderKey(OrderKey(bits)), bits);
  }
  EXPECT_EQ(keys.size(), size_t{kPatterns});
}

TEST(ValueCodeTest, ZigZagIsABijectionThatKeepsSmallThingsSmall) {
  for (int x = 0; x < kPatterns; ++x) {
    const uint16_t d = static_cast<uint16_t>(x);
    const int16_t s = static_cast<int16_t>(d);
    ASSERT_EQ(FromZigZag16(ZigZag16(d)), d);
    ASSERT_EQ(ZigZag16(d), s >= 0 ? 2 * s : -2 * s - 1);
  }
}

TEST(ValueCodeTest, OnlyNoChangeIsZero) {
  for (int x = 0; x < kPatterns; ++x) {
    const uint16_t bits = static_cast<uint16_t>(x);
    ASSERT_EQ(EncodeChange(bits, bits), 0);
    ASSERT_NE(EncodeChange(bits, static_cast<uint16_t>(bits ^ 0x8000)), 0);
    ASSERT_NE(EncodeChange(bits, static_cast<uint16_t>(bits + 1)), 0);
  }
}

TEST(ValueCodeTest, KeysAreInTheOrderOfTheFloats) {
  // -infinity, ..., -0, +0, ..., infinity.
  uint16_t before = OrderKey(0xff80);
  for (int x = 0xff7f; x >= 0x8000; --x) {
    const uint16_t key = OrderKey(static_cast<uint16_t>(x));
    ASSERT_EQ(key, before + 1);
    before = key;
  }
  for (int x = 0; x <= 0x7f80; ++x) {
    const uint16_t key = OrderKey(static_cast<uint16_t>(x));
    ASSERT_EQ(key, before + 1);
    before = key;
  }
}

TEST(ValueCodeTest, AnUlpIsOneOrTwo) {
  EXPECT_EQ(EncodeChange(0x3fff, 0x4000), 2);  // a carry through the mantissa
  EXPECT_EQ(EncodeChange(0x4000, 0x3fff), 1);
  EXPECT_EQ(EncodeChange(0xbfff, 0xc000), 1);
  EXPECT_EQ(EncodeChange(0x0000, 0x8000), 1);
  EXPECT_EQ(EncodeChange(0x8000, 0x0001), 4);
}

// Zeros, denormals, ones, the largest, infinities, NaNs, and a comb over all.
TEST(ValueCodeTest, PairsComeBack) {
  std::vector<int> olds = {0x0000, 0x8000, 0x0001, 0x8001, 0x007f,
                           0x807f, 0x0080, 0x8080, 0x3f80, 0xbf80,
                           0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7f81,
                           0xff81, 0x7fc0, 0xffc0, 0x7fff, 0xffff};
  for (int x = 0; x < kPatterns; x += 257) olds.push_back(x);
  for (const int x : olds) {
    const uint16_t before = static_cast<uint16_t>(x);
    for (int y = 0; y < kPatterns; ++y) {
      const uint16_t after = static_cast<uint16_t>(y);
      ASSERT_EQ(ApplyChange(before, EncodeChange(before, after)), after)
          << before << " to " << after;
    }
  }
}

}  // namespace
}  // namespace gradwire
