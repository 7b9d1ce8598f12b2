// SPDX-License-Identifier: Apache-2.0
// A pass over partial sums, which the L2 cache still holds: bound by latency,
// so many warps share the rows of the same 32 columns.
#include "device/cuda/kernel.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;

__global__ void __launch_bounds__(kThreads)
    ColumnSumsKernel(const float* partials, int64_t rows, int64_t stride,
                     int64_t columns, float* sums) {
  SharedMemory memory;
  const SharedArray<float> of_warps = memory.Take<float>(kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column =
      static_cast<int64_t>(blockIdx.x) * kWarpSize + thread % kWarpSize;
  float sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t r = thread / kWarpSize; r < rows; r += kWarps) {
      sum += partials[r * stride + column];
    }
  }
  of_warps[thread] = sum;
  __syncthreads();
  if (thread >= kWarpSize || column >= columns) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    sum += of_warps[warp * kWarpSize + thread];
  }
  sums[column] += sum;
}

}  // namespace

cudaError_t AddColumnSums(const float* partials, int64_t rows, int64_t stride,
                          int64_t columns, float* sums, cudaStream_t stream) {
  const int64_t blocks = (columns + kWarpSize - 1) / kWarpSize;
  return Launch(ColumnSumsKernel, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), kThreads * sizeof(float), stream, partials,
                rows, stride, columns, sums);
}

}  // namespace gradwire
