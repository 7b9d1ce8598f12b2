// SPDX-License-Identifier: Apache-2.0
// A digest of optimizer state, taken in the pass that changes it: two sums
// modulo 2^64, so that blocks may be added by any thread in any order, and
// pieces on any rank. docs/training.md.
//
// The flat vector's blocks of kDigestBlock elements count from its beginning.
// Of block b, lane L is
//   mix(mix(b) + sum over j and s of key[s][j ^ L] * bits[s][j])
// where bits[s][j] are the 32 bits of element j's float32 master (s = 0), of m
// (1) and of v (2), and of moments in bfloat16 those of the same float32. A
// lane is the sum of those of all blocks.
//
// Keys are odd and mix is one to one: whatever changes one number, changes both
// lanes. Keys differ, and they and the numbers have 32 bits: so does exchanging
// two numbers of a block. Anything else goes undetected once in 2^60 times or
// so. Nobody chooses the numbers, so it need not be harder than that.
#pragma once

#include <cstdint>

namespace gradwire {

// A piece of the flat vector begins and ends at multiples of it, but for the
// vector's end.
inline constexpr int64_t kDigestBlock = 64;

// SplitMix64's finalizer.
constexpr uint64_t DigestMix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct DigestKeys {
  uint32_t key[3][kDigestBlock];
};

inline constexpr DigestKeys kDigestKeys = [] {
  DigestKeys keys = {};
  uint64_t count = 0;
  for (auto& stream : keys.key) {
    for (uint32_t& key : stream) {
      key = static_cast<uint32_t>(DigestMix(++count) >> 32) | 1;
    }
  }
  return keys;
}();

struct DigestSums {
  uint64_t lane[2] = {0, 0};

  // Of block `block`, whose products add up to `sums`.
  void AddBlock(int64_t block, const uint64_t (&sums)[2]) {
    const uint64_t place = DigestMix(static_cast<uint64_t>(block));
    for (int i = 0; i < 2; ++i) lane[i] += DigestMix(place + sums[i]);
  }
  friend bool operator==(const DigestSums&, const DigestSums&) = default;
};

}  // namespace gradwire
