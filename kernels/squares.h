// SPDX-License-Identifier: Apache-2.0
// Sums of squares of a gradient, kept beside it by the ops that write it, so
// that its norm takes no pass of its own.
//
// Beside a matrix f32 [n, k] they are f64 [n, SquareBlocks(k)]: element (i, b)
// is the sum of the squares of the columns [b, b + 1) * kSquareBlock of row i,
// squared and added in float64. A vector is a matrix of one row.
#pragma once

#include <cstdint>

namespace gradwire {

constexpr int64_t kSquareBlock = 256;

inline int64_t SquareBlocks(int64_t columns) {
  return (columns + kSquareBlock - 1) / kSquareBlock;
}

}  // namespace gradwire
