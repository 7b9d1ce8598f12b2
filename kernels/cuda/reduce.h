// SPDX-License-Identifier: Apache-2.0
// Sums and maxima over a warp and a block, in an order that depends on the
// number of threads alone: every thread gets the same bits.
#pragma once

#include "device/cuda/kernel.h"

namespace gradwire {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <typename V>
__device__ inline V WarpSum(V value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

__device__ inline float WarpMax(float value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}

// Over blockDim.x threads, whole warps. `shared` holds one V for each warp; a
// barrier stands between its uses, here and after.
template <typename V>
__device__ inline V BlockSum(V value, SharedArray<V> shared) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = WarpSum(value);
  if (warps == 1) return value;
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[warp] = value;
  __syncthreads();
  V sum = shared[0];
  for (int i = 1; i < warps; ++i) sum += shared[i];
  return sum;
}

__device__ inline float BlockMax(float value, SharedArray<float> shared) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = WarpMax(value);
  if (warps == 1) return value;
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[warp] = value;
  __syncthreads();
  float most = shared[0];
  for (int i = 1; i < warps; ++i) most = fmaxf(most, shared[i]);
  return most;
}

}  // namespace gradwire
