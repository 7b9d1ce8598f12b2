// SPDX-License-Identifier: Apache-2.0
// What the head does with one row of a chunk of logits.
//
// Rows lie in memory that is readable up to the next multiple of kRowPadding
// elements; what is there does not matter.
#pragma once

#include <cstdint>

#include "device/dtype.h"

namespace gradwire {

inline constexpr int64_t kRowPadding = 16;

// -infinity if n is 0.
float RowMax(const float* x, int64_t n);
// Sum of exp(x[i] - max), in float32. Unless `exps` is null it becomes these
// terms in act, padding included; it may be x if act is f32. The sum does not
// depend on `exps`. REQUIRES: no x above max.
float RowExp(const float* x, int64_t n, float max, DType act, void* exps);
// to[i] = factor * exps[i], act; padding included, in place too.
void RowScale(const void* exps, int64_t n, float factor, DType act, void* to);

}  // namespace gradwire
