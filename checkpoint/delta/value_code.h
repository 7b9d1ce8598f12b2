// SPDX-License-Identifier: Apache-2.0
// How a 16-bit float's change becomes a small number. docs/delta.md says why
// floats are subtracted in their own order and not XORed.
#pragma once

#include <cstdint>

namespace gradwire {

// The order of 16-bit floats as unsigned numbers: monotone over all values, a
// bijection over all bit patterns (-0 and +0 are neighbours, NaNs lie beyond
// the infinities).
constexpr uint16_t OrderKey(uint16_t bits) {
  return static_cast<uint16_t>(bits >= 0x8000u ? ~bits : bits | 0x8000u);
}
constexpr uint16_t FromOrderKey(uint16_t key) {
  return static_cast<uint16_t>(key >= 0x8000u ? key & 0x7fffu : ~key);
}

// 0, -1, 1, -2, 2, ... become 0, 1, 2, 3, 4, ...
constexpr uint16_t ZigZag16(uint16_t difference) {
  return static_cast<uint16_t>((difference << 1) ^
                               (difference & 0x8000u ? 0xffffu : 0u));
}
constexpr uint16_t FromZigZag16(uint16_t z) {
  return static_cast<uint16_t>((z >> 1) ^ (z & 1u ? 0xffffu : 0u));
}

// 0 if and only if nothing changed. Differences wrap around modulo 2^16, which
// is what makes every pair of patterns come back.
constexpr uint16_t EncodeChange(uint16_t old_bits, uint16_t new_bits) {
  return ZigZag16(
      static_cast<uint16_t>(OrderKey(new_bits) - OrderKey(old_bits)));
}
constexpr uint16_t ApplyChange(uint16_t old_bits, uint16_t z) {
  return FromOrderKey(
      static_cast<uint16_t>(OrderKey(old_bits) + FromZigZag16(z)));
}

}  // namespace gradwire
