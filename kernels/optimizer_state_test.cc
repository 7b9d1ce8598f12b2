// SPDX-License-Identifier: Apache-2.0
#include "kernels/optimizer_state.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>

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

// Counts how often a part of `low` / 2^16 rounds up, over many indices, steps
// and seeds, for the bits of m and of v: within six standard deviations of the
// right number.
TEST(StochasticBFloat16Test, RoundsUpAsOftenAsItShould) {
  constexpr int64_t kDraws = 1 << 16;
  const std::function<uint32_t(int64_t)> draws[] = {
      [](int64_t i) { return RoundingBits(RoundingKeyOf(0, 1), i); },
      [](int64_t i) {
        return RoundingBits(RoundingKeyOf(0, 1), (int64_t{1} << 40) + i);
      },
      [](int64_t i) { return RoundingBits(RoundingKeyOf(0, i), 1); },
      [](int64_t i) {
        return RoundingBits(RoundingKeyOf(static_cast<uint64_t>(i), 1), 1);
      },
  };
  for (const auto& draw : draws) {
    for (const int shift : {0, 16}) {
      for (const uint32_t low :
           {0x0000u, 0x0001u, 0x0123u, 0x4000u, 0x8000u, 0xabcdu, 0xffffu}) {
        for (const uint32_t high : {0x0000u, 0x3f80u, 0xbfffu, 0x7f7eu}) {
          const float value = std::bit_cast<float>(high << 16 | low);
          int64_t up = 0;
          for (int64_t i = 0; i < kDraws; ++i) {
            const uint32_t random = (draw(i) >> shift) & 0xffffu;
            const uint32_t bits = StochasticBFloat16(value, random).bits;
            ASSERT_TRUE(bits == high || bits == high + 1);
            up += bits == high + 1;
          }
          const double p = low / 65536.0;
          EXPECT_LE(std::abs(static_cast<double>(up) - p * kDraws),
                    6 * std::sqrt(kDraws * p * (1 - p)))
              << low << " of " << high;
        }
      }
    }
  }
}

// Bits of neighbours, of steps that follow each other and of m and v agree in
// half of their places.
TEST(StochasticBFloat16Test, BitsAreIndependent) {
  constexpr int64_t kDraws = 1 << 16;
  const auto bits = [](int64_t step, int64_t index) {
    return RoundingBits(RoundingKeyOf(0, step), index);
  };
  int64_t neighbours = 0, steps = 0, moments = 0;
  for (int64_t i = 0; i < kDraws; ++i) {
    const uint32_t x = bits(1, i);
    neighbours += std::popcount(x ^ bits(1, i + 1));
    steps += std::popcount(x ^ bits(2, i));
    moments += std::popcount((x ^ (x >> 16)) & 0xffffu);
  }
  const auto check = [](int64_t differ, double places) {
    EXPECT_LE(std::abs(static_cast<double>(differ) - places / 2),
              6 * std::sqrt(places / 4));
  };
  check(neighbours, 32.0 * kDraws);
  check(steps, 32.0 * kDraws);
  check(moments, 16.0 * kDraws);
}

TEST(StochasticBFloat16Test, FiniteStaysFiniteAndTheRestIsKept) {
  for (const uint32_t random : {0u, 1u, 0x8000u, 0xffffu}) {
    for (const float sign : {1.0f, -1.0f}) {
      const float largest = sign * 0x1.fffffep127f;
      EXPECT_EQ(static_cast<float>(StochasticBFloat16(largest, random)),
                sign * 0x1.fep127f);
      const float infinite = sign * INFINITY;
      EXPECT_EQ(static_cast<float>(StochasticBFloat16(infinite, random)),
                infinite);
      EXPECT_EQ(static_cast<float>(StochasticBFloat16(sign * 1.5f, random)),
                sign * 1.5f)
          << "what bfloat16 holds is exact";
    }
    for (const uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xffffffffu}) {
      EXPECT_TRUE(std::isnan(static_cast<float>(
          StochasticBFloat16(std::bit_cast<float>(nan), random))));
    }
  }
}

// Other languages and machines must find the same bits.
TEST(StochasticBFloat16Test, TheBitsAreTheseOnEveryMachine) {
  const RoundingKey key = RoundingKeyOf(1, 2);
  EXPECT_EQ(key.first, 0x9673066bu);
  EXPECT_EQ(key.second, 0xbcd9dbb4u);
  EXPECT_EQ(RoundingBits(key, 3), 0x74b3d605u);
  EXPECT_EQ(RoundingBits(key, (int64_t{1} << 32) + 3), 0x1aa9048fu);
}

}  // namespace
}  // namespace gradwire
