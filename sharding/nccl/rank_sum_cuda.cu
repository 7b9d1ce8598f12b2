// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "device/cuda/kernel.h"
#include "sharding/nccl/rank_sum_cuda.h"

namespace gradwire {
namespace {

constexpr int kThreads = 256;
// Enough to fill any GPU, few enough to stay below the limit of a grid.
constexpr int64_t kMaxBlocks = 4096;

// The memory's speed is all there is to it: each element is read once.
template <typename T>
__global__ void SumKernel(RankParts<T> parts, int64_t n, T* out,
                          bool accumulate) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < n; i += step) {
    const T* other = parts.others + i;
    T sum = 0;
    for (int rank = 0; rank < parts.world; ++rank) {
      T value;
      if (rank == parts.rank) {
        value = parts.own[i];
      } else {
        value = *other;
        other += parts.stride;
      }
      sum = rank == 0 ? value : sum + value;
    }
    out[i] = accumulate ? out[i] + sum : sum;
  }
}

}  // namespace

template <typename T>
cudaError_t SumInRankOrder(const RankParts<T>& parts, int64_t n, T* out,
                           bool accumulate, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t wanted = (n + kThreads - 1) / kThreads;
  const auto blocks =
      static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  return LaunchIndependent(SumKernel<T>, dim3(blocks), dim3(kThreads), stream,
                           parts, n, out, accumulate);
}

template cudaError_t SumInRankOrder<float>(const RankParts<float>&, int64_t,
                                           float*, bool, cudaStream_t);
template cudaError_t SumInRankOrder<double>(const RankParts<double>&, int64_t,
                                            double*, bool, cudaStream_t);

}  // namespace gradwire
