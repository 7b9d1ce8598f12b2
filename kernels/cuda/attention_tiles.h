// SPDX-License-Identifier: Apache-2.0
// Tiles of bf16 in shared memory and the two products of attention on tensor
// cores. A warp owns 16 kRowTiles rows of its block's tile and meets all rows
// of a second tile, so softmax and its gradient stay within a warp, and what
// the first product leaves in registers is the left side of the second one.
//
// A row of kDim elements is 8 elements longer in memory: an odd number of 16
// bytes, so that the 8 rows which ldmatrix takes at once lie in different
// banks. Unlike a swizzle this leaves all offsets constant. Heads narrower than
// kDim are padded with zeros.
#pragma once

#include <bit>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "device/dtype.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {

inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;

// The head dims that kernels are made for.
template <typename Body>
auto WithPaddedHeadDim(int64_t head_dim, const Body& body) {
  if (head_dim <= 64) return body.template operator()<64>();
  if (head_dim <= 96) return body.template operator()<96>();
  if (head_dim <= 128) return body.template operator()<128>();
  return body.template operator()<256>();
}

template <int kDim>
inline constexpr int kTilePitch = kDim + 8;

template <int kDim>
constexpr int TileElements(int rows) {
  return rows * kTilePitch<kDim>;
}

using Bf16Tile = SharedArray<BFloat16>;

__device__ inline int WarpOfBlock() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}
__device__ inline int LaneOfWarp() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}

// Queues the copies of kRows rows from `begin` on; zeros beyond the sequence
// and the head.
template <int kDim, int kRows>
__device__ inline void LoadTile(Bf16Tile to,
                                const HeadRows<const BFloat16>& from,
                                int begin) {
  // A thread keeps to one column: one address, moved on row by row, where an
  // address for each copy would take registers from the accumulators.
  constexpr int kLanes = static_cast<int>(std::bit_ceil(kDim / 8u));
  constexpr int kStep = kAttentionThreads / kLanes;
  static_assert(kRows % kStep == 0);
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;
  if (column >= kDim) return;
  const bool of_head = column < from.head_dim;
  int row = static_cast<int>(threadIdx.x) / kLanes;
  const BFloat16* at = from.Row(begin + row) + column;
#pragma unroll
  for (int j = 0; j < kRows / kStep; ++j) {
    CopyAsync16(to, row * kTilePitch<kDim> + column, at,
                of_head && begin + row < from.length);
    row += kStep;
    at += kStep * from.stride;
  }
}

// What a lane holds of 16 kRowTiles rows by 8 kColumnTiles columns: of tile
// (r, n) the rows 16 r + lane / 4 and 8 below, columns 8 n + 2 (lane % 4) and
// the next; elements 2 h + i are of row 8 h and column i.
template <int kRowTiles, int kColumnTiles>
using Accumulator = float[kRowTiles][kColumnTiles][4];

// The same values as the left side of a product of depth 16 kDepth.
template <int kRowTiles, int kDepth>
using LeftSide = uint32_t[kRowTiles][kDepth][4];

template <int kRowTiles, int kColumnTiles>
__device__ inline void Clear(Accumulator<kRowTiles, kColumnTiles>& acc) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[r][n][i] = 0.0f;
    }
  }
}

template <int kRowTiles, int kColumnTiles>
__device__ inline void Copy(const Accumulator<kRowTiles, kColumnTiles>& from,
                            Accumulator<kRowTiles, kColumnTiles>& to) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[r][n][i] = from[r][n][i];
    }
  }
}

// acc += a b^T: the warp's rows of `a`, from `row` on, with the first
// 8 kColumnTiles rows of `b`.
template <int kDim, int kRowTiles, int kColumnTiles>
__device__ inline void AddRowProducts(
    Bf16Tile a, int row, Bf16Tile b,
    Accumulator<kRowTiles, kColumnTiles>& acc) {
  constexpr int kPitch = kTilePitch<kDim>;
  const int lane = LaneOfWarp();
  const int from_a = (row + lane % 16) * kPitch + lane / 16 * 8;
  const int from_b = (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    uint32_t left[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      LdMatrixX4(left[r], a, from_a + r * 16 * kPitch + d);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t both[4];
      LdMatrixX4(both, b, from_b + n * 8 * kPitch + d);
      const uint32_t right[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        MmaBf16(acc[r][n], left[r], right[0]);
        MmaBf16(acc[r][n + 1], left[r], right[1]);
      }
    }
  }
}

// Of queries by keys: `value` where the key comes after the query.
// `first_query` is of row 0, `first_key` of column 0.
template <int kRowTiles, int kColumnTiles>
__device__ inline void SetLaterKeys(int first_query, int first_key, float value,
                                    Accumulator<kRowTiles, kColumnTiles>& acc) {
  const int lane = LaneOfWarp();
  const int ahead = first_query + lane / 4 - first_key - lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n * 8 + i % 2 > ahead + r * 16 + i / 2 * 8) acc[r][n][i] = value;
      }
    }
  }
}

template <int kRowTiles, int kColumnTiles>
__device__ inline void Round(const Accumulator<kRowTiles, kColumnTiles>& acc,
                             LeftSide<kRowTiles, kColumnTiles / 2>& left) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        left[r][n / 2][n % 2 * 2 + h] =
            PackBf16(acc[r][n][2 * h], acc[r][n][2 * h + 1]);
      }
    }
  }
}

// acc += left b, where b has 16 kDepth rows.
template <int kDim, int kRowTiles, int kDepth>
__device__ inline void AddProduct(const LeftSide<kRowTiles, kDepth>& left,
                                  Bf16Tile b,
                                  Accumulator<kRowTiles, kDim / 8>& acc) {
  constexpr int kPitch = kTilePitch<kDim>;
  const int lane = LaneOfWarp();
  const int from_b = lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t both[4];
      LdMatrixX4Transposed(both, b, from_b + k * 16 * kPitch + n * 8);
      const uint32_t right[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        MmaBf16(acc[r][n], left[r][k], right[0]);
        MmaBf16(acc[r][n + 1], left[r][k], right[1]);
      }
    }
  }
}

// Writes the warp's rows, `row` and on of a tile that begins at row `begin` of
// `to`, through its own rows of `room`, so that they leave by 16 bytes:
// place(row, column) is where an element of the tile lies there.
// REQUIRES: other warps do not use these rows of `room` any more.
template <int kDim, int kRowTiles, class Place>
__device__ inline void StoreRowsThrough(
    const Accumulator<kRowTiles, kDim / 8>& acc, Bf16Tile room,
    const Place& place, int row, int begin, const HeadRows<BFloat16>& to) {
  constexpr int kPacks = kDim / 8;
  using RowPack = Pack<BFloat16, 8>;
  const int lane = LaneOfWarp();
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        room.Store<uint32_t>(
            place(row + r * 16 + h * 8 + lane / 4, n * 8 + lane % 4 * 2),
            PackBf16(acc[r][n][2 * h], acc[r][n][2 * h + 1]));
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < kRowTiles * 16 * kPacks; i += kWarpSize) {
    const int at = row + i / kPacks, column = i % kPacks * 8;
    if (begin + at < to.length && column < to.head_dim) {
      StorePack(to.Row(begin + at) + column,
                room.Load<RowPack>(place(at, column)));
    }
  }
}

template <int kDim, int kRowTiles>
__device__ inline void StoreRows(const Accumulator<kRowTiles, kDim / 8>& acc,
                                 Bf16Tile room, int row, int begin,
                                 const HeadRows<BFloat16>& to) {
  StoreRowsThrough<kDim>(
      acc, room,
      [](int at, int column) { return at * kTilePitch<kDim> + column; }, row,
      begin, to);
}

}  // namespace gradwire
