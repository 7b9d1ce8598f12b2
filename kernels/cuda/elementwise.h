// SPDX-License-Identifier: Apache-2.0
// Passes over flat vectors, element by element. Bound by memory: a thread has
// several loads under way before it stores anything, and threads of a warp take
// neighbours.
//
// What a pass does is an Op, by value:
//   static constexpr int kPack    elements that one load or store moves
//   bool IsAligned() const        whether its addresses allow that
//   template <int kN> auto Load(int64_t i) const
//   template <int kN> void Store(int64_t i, const auto& loaded) const
// Store may write over what Load of the same elements has read.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/elements.h"

namespace gradwire {

inline constexpr int kElementwiseThreads = 256;
// Packs of a thread that are under way at once.
inline constexpr int kElementwiseLoads = 2;
// Several waves on any GPU, so that the last one is a small part.
inline constexpr int64_t kElementwiseBlocks = 8192;

template <int kN, class Op>
__device__ inline void ElementwisePacks(const Op& op, int64_t packs) {
  constexpr int64_t kBlock = kElementwiseThreads * kElementwiseLoads;
  for (int64_t begin = blockIdx.x * kBlock; begin < packs;
       begin += gridDim.x * kBlock) {
    const int64_t first = begin + threadIdx.x;
    decltype(op.template Load<kN>(0)) loaded[kElementwiseLoads] = {};
#pragma unroll
    for (int j = 0; j < kElementwiseLoads; ++j) {
      const int64_t i = first + j * kElementwiseThreads;
      if (i < packs) loaded[j] = op.template Load<kN>(i * kN);
    }
#pragma unroll
    for (int j = 0; j < kElementwiseLoads; ++j) {
      const int64_t i = first + j * kElementwiseThreads;
      if (i < packs) op.template Store<kN>(i * kN, loaded[j]);
    }
  }
}

template <int kN, class Op>
__global__ void __launch_bounds__(kElementwiseThreads)
    ElementwiseKernel(Op op, int64_t n) {
  ElementwisePacks<kN>(op, n / kN);
  // The last few, which fill no pack.
  if (kN > 1 && blockIdx.x == 0 && threadIdx.x < n % kN) {
    const int64_t i = n / kN * kN + threadIdx.x;
    op.template Store<1>(i, op.template Load<1>(i));
  }
}

template <class... Pointers>
bool AreAligned(std::uintptr_t bytes, Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % bytes == 0) && ...);
}

// REQUIRES: n > 0.
template <class Op>
cudaError_t Elementwise(const Op& op, int64_t n, cudaStream_t stream) {
  const auto launch = [&](auto* kernel, int64_t packs) {
    const int64_t block = int64_t{kElementwiseThreads} * kElementwiseLoads;
    const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(
        (packs + block - 1) / block, 1, kElementwiseBlocks));
    return Launch(kernel, dim3(blocks), dim3(kElementwiseThreads), 0, stream,
                  op, n);
  };
  return op.IsAligned()
             ? launch(ElementwiseKernel<Op::kPack, Op>, n / Op::kPack)
             : launch(ElementwiseKernel<1, Op>, n);
}

}  // namespace gradwire
