// SPDX-License-Identifier: Apache-2.0
// What the head does with one row of a chunk of logits.
//
// Rows lie in memory that is readable up to the next multiple of kRowPadding
// elements; what is there does not matter.
#pragma once

#include <cstdint>

namespace gradwire {

inline constexpr int64_t kRowPadding = 16;

// -infinity if n is 0.
float RowMax(const float* x, int64_t n);
// Sum of exp(x[i] - max). REQUIRES: no x above max.
float RowSumExp(const float* x, int64_t n, float max);
// x[i] = -factor * exp(x[i] - lse)
void RowNegativeProbs(float* x, int64_t n, float lse, float factor);

}  // namespace gradwire
