// SPDX-License-Identifier: Apache-2.0
// The vector loops of the delta decoder: changes added to weights in place.
// Each checks its input whole before it touches a weight, and then runs without
// checks. Adding the negated differences gives back the old weights, bit for
// bit. Thread rule: pure functions.
#pragma once

#include <cstdint>

namespace gradwire {

// How far beyond `n` the differences of ReadValues may be read and overwritten.
inline constexpr int64_t kPatchSlack = 64;

// Whether differences are added or, to undo that, subtracted.
enum class Direction { kApply, kUndo };

// The differences [n + kPatchSlack] that the value bytes [n] stand for;
// `escapes` are little-endian uint16 values. False unless exactly `num_escapes`
// of them are used and every value that is given has changed something.
bool ReadValues(const uint8_t* bytes, int64_t n, const uint8_t* escapes,
                int64_t num_escapes, Direction direction,
                uint16_t* differences);

// Adds differences [n] to the elements of `weights` [size] that the gaps name.
// False, with nothing done, if the gaps name another number of elements or one
// outside. `crc` is the CRC32C of all weights afterwards.
bool PatchGaps(const uint8_t* gaps, int64_t num_bytes,
               const uint16_t* differences, int64_t n, uint16_t* weights,
               int64_t size, uint32_t& crc);

// The same by a bitmap of ceil(size / 8) bytes. False, with nothing done, if it
// has another number of ones, or one beyond `size`.
bool PatchBitmap(const uint8_t* bitmap, const uint16_t* differences, int64_t n,
                 uint16_t* weights, int64_t size);

// The same for all elements, from the low and high bytes of their change.
void PatchDense(const uint8_t* low, const uint8_t* high, Direction direction,
                uint16_t* weights, int64_t size);

}  // namespace gradwire
