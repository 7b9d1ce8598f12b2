// SPDX-License-Identifier: Apache-2.0
#include "kernels/optimizer_state.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>

namespace gradwire {
namespace {

// Every upper half with lower halves around each limit and a stride of others.
// All 2^32 patterns are no more cases: what a lower half does depends on
// whether it is at least 0x8000 (the carry) and, in a NaN, not 0.
TEST(SplitHalvesTest, JoinsToWhatWasSplit) {
  int64_t wrong = 0;
  const auto check = [&](uint32_t bits) {
    const float value = std::bit_cast<float>(bits);
    const Halves halves = SplitHalves(value);
    const float joined = JoinHalves(halves);
    const float high = static_cast<float>(halves.high);
    if (std::isnan(value)) {
      wrong += !std::isnan(joined) || !std::isnan(high);
      return;
    }
    wrong += std::bit_cast<uint32_t>(joined) != bits;
    wrong += std::signbit(high) != std::signbit(value) || std::isnan(high);
    wrong += std::isinf(value) && high != value;
  };
  for (uint32_t high = 0; high < 0x10000u; ++high) {
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      check(high << 16 | low);
    }
    for (uint32_t low = high % 509; low < 0x10000u; low += 509) {
      check(high << 16 | low);
    }
  }
  EXPECT_EQ(wrong, 0);
}

// The upper half is the nearest bfloat16, as in any other rounding but for
// ties, which go away from zero.
TEST(SplitHalvesTest, TheUpperHalfIsRounded) {
  for (const uint32_t high : {0x0000u, 0x3f80u, 0x3f81u, 0xbf80u, 0x7f7eu}) {
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8001u, 0xffffu}) {
      const float value = std::bit_cast<float>(high << 16 | low);
      EXPECT_EQ(SplitHalves(value).high.bits, BFloat16(value).bits);
    }
    const float tie = std::bit_cast<float>(high << 16 | 0x8000u);
    EXPECT_EQ(SplitHalves(tie).high.bits, high + 1);
    EXPECT_EQ(SplitHalves(tie).low, -0x8000);
  }
  // The largest finite value rounds to infinity, and is still there.
  const Halves largest = SplitHalves(0x1.fffffep127f);
  EXPECT_TRUE(std::isinf(static_cast<float>(largest.high)));
  EXPECT_EQ(JoinHalves(largest), 0x1.fffffep127f);
}

}  // namespace
}  // namespace gradwire
