// SPDX-License-Identifier: Apache-2.0
// How optimizer state is stored in less than float32, bit for bit the same on
// every backend. docs/training.md.
//
// A split master: the float32 master weight of a bf16 job is the bfloat16 that
// products compute with, and beside it what that one lacks, in 16 bits. Ties
// must round away from zero: rounded to even, half of them would leave +0x8000,
// which an int16 cannot hold.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "device/dtype.h"

namespace gradwire {

// With `bits` those of the value:
//   high = (bits + 0x8000) >> 16, low = int16(bits - (high << 16)).
// A finite value may carry into an infinite `high`, as in any rounding; the
// value itself stays. A NaN becomes a quiet NaN with a `low` of 0, where the
// formula could carry into the sign.
struct Halves {
  BFloat16 high;
  int16_t low = 0;
};

inline Halves SplitHalves(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  Halves halves;
  if (std::isnan(value)) {
    halves.high.bits = static_cast<uint16_t>((bits >> 16) | 0x0040u);
    return halves;
  }
  halves.high.bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  halves.low = static_cast<int16_t>(bits & 0xffffu);
  return halves;
}

// (high << 16) + low: the value that was split.
inline float JoinHalves(const Halves& halves) {
  const uint32_t high = static_cast<uint32_t>(halves.high.bits) << 16;
  return std::bit_cast<float>(high +
                              static_cast<uint32_t>(int32_t{halves.low}));
}

}  // namespace gradwire
