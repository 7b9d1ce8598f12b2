// SPDX-License-Identifier: Apache-2.0
// The vector loops of the delta encoder: what changed in a chunk, and the bytes
// that say so. Thread rule: pure functions.
#pragma once

#include <cstdint>

namespace gradwire {

// How far beyond their last element outputs may be overwritten.
inline constexpr int64_t kScanSlack = 64;

// Which of the elements of `before` and `after`, both [n], differ: bit i % 64
// of word i / 64 of `bitmap` [ceil(n / 64)]. Returns how many.
int64_t FindChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                    uint64_t* bitmap);

// Where the ones of a bitmap of n bits are, ascending, counted from `base`;
// base + n <= 65,536. `positions` needs room for them and kScanSlack. Returns
// how many.
int64_t TakePositions(const uint64_t* bitmap, int64_t n, int64_t base,
                      uint16_t* positions);

// The change (value_code.h) of the elements at `positions` [count].
void TakeChangesAt(const uint16_t* before, const uint16_t* after,
                   const uint16_t* positions, int64_t count, uint16_t* z);

// The change of the ones of a bitmap, and where they are unless `positions` is
// null: faster than the two above if they are many. Outputs need room for them
// and kScanSlack.
void TakeChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                 const uint64_t* bitmap, uint16_t* positions, uint16_t* z);

// The bytes of `z` [n]: itself up to 254, else 255 with the value appended to
// `escapes`, which needs room for n. `out` [n + kScanSlack]. Returns how many
// escaped.
int64_t NarrowValues(const uint16_t* z, int64_t n, uint8_t* out,
                     uint16_t* escapes);

// For each of the ascending `positions` [n] how many elements lie between it
// and the one before; a byte 255 adds 255 and continues. `out` needs room for
// n + 257 + kScanSlack. Returns the number of bytes.
int64_t EncodeGaps(const uint16_t* positions, int64_t n, uint8_t* out);

// The change of every element, zeros included, as low and high bytes, each
// [n + kScanSlack].
void DenseChanges(const uint16_t* before, const uint16_t* after, int64_t n,
                  uint8_t* low, uint8_t* high);

// Byte `p` of each of n elements, and back.
void TakePlane(const uint8_t* elements, int64_t n, int64_t element_bytes,
               int64_t p, uint8_t* plane);
void PutPlane(const uint8_t* plane, int64_t n, int64_t element_bytes, int64_t p,
              uint8_t* elements);

}  // namespace gradwire
