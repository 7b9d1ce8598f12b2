// SPDX-License-Identifier: Apache-2.0
// Products of bf16 matrices on processors with AVX512-BF16 and without AMX.
//
// Our own, because a training step's products change one operand every time: a
// library packs all of it before it begins. Here a panel of columns is packed
// as it is needed, stays in the second-level cache while all rows pass by, and
// is gone.
//
// An element of the result is one sum over k in ascending order, two products
// an instruction, whatever else is computed with it. So a row of a result has
// the same bits in any batch and on any number of threads.
#pragma once

#include <cstdint>

#include "kernels/cpu/gemm.h"

namespace gradwire {

// Whether this processor has the instructions.
bool HasBf16Dot();

// A part of a product for one thread: rows [row, row_end) and columns
// [col, col_end) of c.
struct GemmPart {
  int64_t row = 0, row_end = 0;
  int64_t col = 0, col_end = 0;
};

// How `threads` threads share a product: part `thread`, which may be empty.
// With `squares` the columns are cut only where a sum of squares ends.
GemmPart Bf16GemmPart(const GemmShape& shape, bool squares, int threads,
                      int thread);

// Bytes of scratch that a part takes.
int64_t Bf16GemmScratchBytes(const GemmShape& shape, const GemmPart& part);

// Computes a part. `squares` is null or as for Gemm::Run, of all of c;
// `scratch` is aligned to a cache line; `skip` is null or as for Gemm::RunOne,
// and is followed to within a tile of the result. REQUIRES: HasBf16Dot();
// shape.ab is bf16; of a's strides one is 1, and of b's.
void Bf16GemmRun(const GemmShape& shape, const GemmPart& part,
                 const BFloat16* a, const BFloat16* b, void* c, double* squares,
                 char* scratch, const CausalSkip* skip = nullptr);

}  // namespace gradwire
