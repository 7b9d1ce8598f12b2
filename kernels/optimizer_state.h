// SPDX-License-Identifier: Apache-2.0
// How optimizer state is stored in less than float32, bit for bit the same on
// every backend. docs/training.md.
//
// A split master: the float32 master weight of a bf16 job is the bfloat16 that
// products compute with, and beside it what that one lacks, in 16 bits. Ties
// must round away from zero: rounded to even, half of them would leave +0x8000,
// which an int16 cannot hold.
//
// Moments in bfloat16, rounded stochastically: with beta2 = 0.999 a step
// changes v by less than half a unit in bfloat16's last place, and rounding to
// nearest would leave it where it is for ever. Rounded up with the probability
// that is the part cut off, it is right on average.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "device/dtype.h"
#include "device/host_device.h"

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

GW_HOST_DEVICE inline Halves SplitHalves(float value) {
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
GW_HOST_DEVICE inline float JoinHalves(const Halves& halves) {
  const uint32_t high = static_cast<uint32_t>(halves.high.bits) << 16;
  return std::bit_cast<float>(high +
                              static_cast<uint32_t>(int32_t{halves.low}));
}

// The random bits of a step: a function of seed and step, so that the same step
// again gives the same bits, whatever the threads, vectors or ranks.
struct RoundingKey {
  uint32_t first = 0, second = 0;
};

// SplitMix64's finalizer, of the seed and then of the step.
GW_HOST_DEVICE inline RoundingKey RoundingKeyOf(uint64_t seed, int64_t step) {
  const auto mix = [](uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  };
  const uint64_t key = mix(mix(seed) + static_cast<uint64_t>(step));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// What RoundingBits begins with, beside the lower 32 bits of the index.
GW_HOST_DEVICE inline uint32_t RoundingStart(const RoundingKey& key,
                                             int64_t index) {
  return key.first ^
         (static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32) *
          0x9e3779b9u);
}

// 32 bits for the element of this index: the lower 16 round m, the upper 16 v.
// The "lowbias32" hash (C. Wellons, Prospecting for Hash Functions), with the
// key's second word added half-way.
GW_HOST_DEVICE inline uint32_t RoundingBits(const RoundingKey& key,
                                            int64_t index) {
  uint32_t x = RoundingStart(key, index) ^ static_cast<uint32_t>(index);
  x = (x ^ (x >> 16)) * 0x7feb352du + key.second;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Adds `random`, < 2^16, below the last place that is kept, and cuts off. A
// finite value stays finite: beyond the largest bfloat16 it becomes that one.
GW_HOST_DEVICE inline BFloat16 StochasticBFloat16(float value,
                                                  uint32_t random) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  BFloat16 out;
  if (!std::isfinite(value)) {
    out.bits =
        static_cast<uint16_t>((bits >> 16) | (std::isnan(value) ? 0x40u : 0u));
    return out;
  }
  const uint32_t size =
      std::min((bits & 0x7fffffffu) + random, uint32_t{0x7f7fffffu});
  out.bits = static_cast<uint16_t>(((bits & 0x80000000u) | size) >> 16);
  return out;
}

}  // namespace gradwire
