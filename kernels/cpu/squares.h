// SPDX-License-Identifier: Apache-2.0
// Sums of squares (kernels/squares.h) of part of a matrix, on the calling
// thread.
#pragma once

#include <cstdint>

namespace gradwire {

// x [rows, cols] with rows `stride` apart, from a column that is a multiple of
// kSquareBlock; squares [rows, SquareBlocks(cols)] =, rows `squares_stride`
// apart.
void SquaresOfRows(const float* x, int64_t rows, int64_t cols, int64_t stride,
                   double* squares, int64_t squares_stride);

}  // namespace gradwire
