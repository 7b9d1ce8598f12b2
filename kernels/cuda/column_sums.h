// SPDX-License-Identifier: Apache-2.0
// The second half of a sum over tokens: blocks leave the sums of their tokens
// in scratch memory, and these are added in an order that depends on their
// number alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gradwire {

// sums[c] += the sum over r < rows of partials[r * stride + c], c < columns.
cudaError_t AddColumnSums(const float* partials, int64_t rows, int64_t stride,
                          int64_t columns, float* sums, cudaStream_t stream);

}  // namespace gradwire
