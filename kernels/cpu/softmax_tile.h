// SPDX-License-Identifier: Apache-2.0
// The element-wise half of attention: what happens to a tile of scores between
// two matrix products.
//
// Row r of a tile is token r / group under query head r % group: the heads that
// share a key-value head are stacked, so that one product serves them all.
#pragma once

#include <cstdint>

#include "device/dtype.h"

namespace gradwire {

// Columns of a tile are padded to a multiple of this, the widest vector.
inline constexpr int64_t kTileLanes = 16;

struct TileShape {
  int64_t tokens = 0;
  int64_t group = 0;
  int64_t cols = 0;  // a multiple of kTileLanes
  // Columns that token 0 sees; each later token sees one more. May be negative.
  int64_t visible = 0;
  float scale = 0;
};

// One step of the online softmax: takes the scores q.k of a tile into the
// running maximum and sum of each row and leaves exp(score - maximum), 0 where
// hidden. `out` is rescaled where the maximum has grown.
struct SoftmaxForwardTile {
  TileShape shape;
  float* scores = nullptr;    // f32 [rows, cols], overwritten if probs is null
  BFloat16* probs = nullptr;  // [rows, cols] = , or null
  float* max = nullptr;       // [rows]
  float* sum = nullptr;       // [rows]
  float* out = nullptr;       // [rows, head_dim]
  int64_t head_dim = 0;
};
void SoftmaxForward(const SoftmaxForwardTile& tile);

// p = exp(score - lse), d_score = scale * p * (d_p - delta); 0 where hidden.
struct SoftmaxBackwardTile {
  TileShape shape;
  float* scores = nullptr;       // f32 [rows, cols]; becomes p if probs is null
  float* d_probs = nullptr;      // f32 [rows, cols]; becomes d_score likewise
  BFloat16* probs = nullptr;     // [rows, cols] = , or null
  BFloat16* d_scores = nullptr;  // [rows, cols] = , or null
  const float* lse = nullptr;    // [rows]
  const float* delta = nullptr;  // [rows]
};
void SoftmaxBackward(const SoftmaxBackwardTile& tile);

// dots[r] = sum over i of a[r, i] b[r, i].   a, b act [rows, cols], dense
void RowDots(DType act, const void* a, const void* b, int64_t rows,
             int64_t cols, float* dots);

// to[r, c] = from[r, c] in act, divided by the divisor of its run of columns if
// there are any.
struct RowsToStore {
  int64_t rows = 1, cols = 0;
  const float* from = nullptr;  // f32
  int64_t from_row = 0;         // from row to row, in elements
  void* to = nullptr;           // act
  int64_t to_row = 0;
  const float* divisors = nullptr;  // f32 [rows, cols / run], or null
  int64_t run = 0;
};
void StoreRows(DType act, const RowsToStore& rows);

// to[r, c] += from[r, c].   from f32 [rows, cols], dense
void AddRows(const float* from, int64_t rows, int64_t cols, float* to,
             int64_t to_row);
// to += from.   f32 [n]
inline void AddTo(const float* from, int64_t n, float* to) {
  AddRows(from, 1, n, to, n);
}

}  // namespace gradwire
