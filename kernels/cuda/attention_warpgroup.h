// SPDX-License-Identifier: Apache-2.0
// Attention on sm_90a: what attention_tiles.h is for warps, for warpgroups
// (device/cuda/warpgroup.h). A warpgroup owns 64 rows of its block's tile, a
// warp 16 of them, and lanes hold what they hold there of one row tile; so
// softmax and its gradient are the same code. The first product takes both
// sides from shared memory, the second its left side from registers.
//
// For heads of up to 64, and of 97 to 128: a panel of 64 columns is whole, and
// the backward's sums fit the registers.
#pragma once

#include <cstdint>

#include "device/cuda/kernel.h"
#include "device/cuda/warpgroup.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {

inline bool AttentionOnWarpgroups(const AttentionShape& shape) {
  return shape.head_dim <= 64 || (shape.head_dim > 96 && shape.head_dim <= 128);
}

// As the functions for warps; REQUIRES AttentionOnWarpgroups.
cudaError_t AttentionForwardOnWarpgroups(const AttentionCall& call,
                                         AttentionForwardArgs<BFloat16> args);
cudaError_t AttentionQueryGradientOnWarpgroups(
    const AttentionCall& call, AttentionGradArgs<BFloat16> args);
cudaError_t AttentionKeyGradientOnWarpgroups(const AttentionCall& call,
                                             AttentionGradArgs<BFloat16> args);

// A block; one fills an SM.
inline constexpr int kBlockWarpgroups = 2;
inline constexpr int kWideThreads = kBlockWarpgroups * kWarpgroup;
inline constexpr int kRowsPerWarpgroup = 64;
inline constexpr int kWideRows = kBlockWarpgroups * kRowsPerWarpgroup;

template <typename Body>
auto WithPanels(int64_t head_dim, const Body& body) {
  return head_dim <= 64 ? body.template operator()<64>()
                        : body.template operator()<128>();
}

// The same of all lanes, which the assembler is told by this exchange.
__device__ inline int WarpgroupOfBlock() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

template <class Tile>
__device__ inline Tile TakeTile(SharedMemory& memory) {
  return {memory.Take<BFloat16, Tile::kAlign>(Tile::kElements)};
}

// kCount of them that take turns.
template <class Tile, int kCount>
struct TileRing {
  SharedArray<BFloat16> elements;

  __device__ explicit TileRing(SharedMemory& memory)
      : elements(
            memory.Take<BFloat16, Tile::kAlign>(kCount * Tile::kElements)) {}
  __device__ Tile operator[](int step) const {
    return {elements.Slice(step % kCount * Tile::kElements, Tile::kElements)};
  }
};

// Queues the copies of the tile's rows from `begin` on; zeros beyond the
// sequence and the head.
template <class Tile>
__device__ inline void LoadSwizzled(const Tile& to,
                                    const HeadRows<const BFloat16>& from,
                                    int begin) {
  // A thread keeps to one column and to rows of one remainder by 8, so that
  // both addresses move on by a constant.
  constexpr int kLanes = Tile::kColumns / 8;
  constexpr int kStep = kWideThreads / kLanes;
  static_assert(Tile::kRows % kStep == 0 && kStep % 8 == 0);
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;
  const bool of_head = column < from.head_dim;
  int row = static_cast<int>(threadIdx.x) / kLanes;
  int place = Tile::At(row, column);
  const BFloat16* at = from.Row(begin + row) + column;
#pragma unroll
  for (int j = 0; j < Tile::kRows / kStep; ++j) {
    CopyAsync16(to.elements, place, at, of_head && begin + row < from.length);
    row += kStep;
    place += kStep * Tile::kPanel;
    at += kStep * from.stride;
  }
}

// What was loaded, and what the loads before these have left free, is for all
// threads' products and loads after this.
__device__ inline void ShareLoads() {
  ShowToProducts();
  __syncthreads();
}

// Queues acc = a b^T: 64 rows of `a`, from `row` on, with all of `b`.
template <class A, class B>
__device__ inline void QueueRowProducts(const A& a, int row, const B& b,
                                        Accumulator<1, B::kRows / 8>& acc) {
  static_assert(A::kColumns == B::kColumns);
#pragma unroll
  for (int d = 0; d < A::kColumns; d += 16) {
    MultiplyRows<B::kRows / 8>(acc[0], a.Rows(row, d), b.Rows(0, d), d > 0);
  }
}

// Queues acc += left b.
template <class B>
__device__ inline void QueueProduct(const LeftSide<1, B::kRows / 16>& left,
                                    const B& b,
                                    Accumulator<1, B::kColumns / 8>& acc) {
#pragma unroll
  for (int k = 0; k < B::kRows / 16; ++k) {
    MultiplyColumns<B::kColumns / 8>(acc[0], left[0][k], b.Columns(16 * k),
                                     true);
  }
}

// Of a block whose products are done: `room` is free for all warps.
template <class Tile>
__device__ inline void StoreSwizzled(
    const Accumulator<1, Tile::kColumns / 8>& acc, const Tile& room, int row,
    int begin, const HeadRows<BFloat16>& to) {
  StoreRowsThrough<Tile::kColumns>(
      acc, room.elements,
      [](int at, int column) { return Tile::At(at, column); }, row, begin, to);
}

}  // namespace gradwire
