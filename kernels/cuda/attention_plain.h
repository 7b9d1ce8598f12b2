// SPDX-License-Identifier: Apache-2.0
// Attention without tensor cores, for float32 and for rows of bf16 that no
// 16-byte copy fits: products of tiles in float32, of any head dim.
//
// A block of 16 x 16 threads owns 64 rows and meets 64 others at a time; a
// thread holds 4 x 4 of their products. Both sides of a product lie in shared
// memory by depth, then row, so that a thread takes 4 elements of each with one
// load. Output columns beyond 128 are another block's, which makes the scores
// again: accumulators fit in registers whatever the head dim is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/elements.h"

namespace gradwire {

inline constexpr int kPlainRows = 64;
inline constexpr int kPlainThreads = 256;
// Of a head, at a time.
inline constexpr int kPlainDepth = 32;
inline constexpr int kPlainColumns = 64;
// Parts of kPlainColumns that a block's accumulators hold.
inline constexpr int kPlainParts = 2;
inline constexpr int kPlainPitch = kPlainRows + 4;
inline constexpr int kPlainSide = kPlainDepth * kPlainPitch;
inline constexpr int kPlainTile = kPlainRows * kPlainPitch;
static_assert(kPlainTile == 2 * kPlainSide && kPlainColumns == kPlainRows);

// T is float or BFloat16. Tiles are sent to the workspace.
template <typename T>
cudaError_t PlainAttentionForward(const AttentionCall& call,
                                  AttentionForwardArgs<T> args);
// args.stats are there.
template <typename T>
cudaError_t PlainAttentionBackward(const AttentionCall& call,
                                   const AttentionGradArgs<T>& args);

// Which columns of the head are the block's; blocks of a tile and head are
// neighbours.
inline int PlainBlocksPerHead(int head_dim) {
  constexpr int kColumns = kPlainParts * kPlainColumns;
  return (head_dim + kColumns - 1) / kColumns;
}

using PlainProducts = float[4][4];

// Rows from Down() on of a tile are the thread's, and columns from Across() on,
// four each.
__device__ inline int Down() { return static_cast<int>(threadIdx.x) / 16 * 4; }
__device__ inline int Across() {
  return static_cast<int>(threadIdx.x) % 16 * 4;
}

__device__ inline void Clear(PlainProducts& acc) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
  }
}

// acc[i][j] += sum over k < depth of a[k][down + i] b[k][across + j].
__device__ inline void AddPlainProduct(SharedArray<float> a,
                                       SharedArray<float> b, int depth,
                                       PlainProducts& acc) {
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    const auto left = a.Load<Pack<float, 4>>(k * kPlainPitch + Down());
    const auto right = b.Load<Pack<float, 4>>(k * kPlainPitch + Across());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        acc[i][j] = fmaf(left.element[i], right.element[j], acc[i][j]);
      }
    }
  }
}

// Element (begin + row, column + c) of `from`; 0 beyond its rows and columns.
template <typename T>
__device__ inline float PlainElement(const HeadRows<const T>& from, int row,
                                     int column) {
  if (row >= from.length || column >= from.head_dim) return 0.0f;
  return static_cast<float>(from.Row(row)[column]);
}

// to [kPlainDepth, rows]: 64 rows from `begin` on, columns from `column` on.
template <typename T>
__device__ inline void LoadByDepth(SharedArray<float> to,
                                   const HeadRows<const T>& from, int begin,
                                   int column) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kPlainRows * kPlainDepth;
       i += kPlainThreads) {
    const int row = i / kPlainDepth, c = i % kPlainDepth;
    to[c * kPlainPitch + row] = PlainElement(from, begin + row, column + c);
  }
}

// to [rows, kPlainColumns], the right side of a product over rows.
template <typename T>
__device__ inline void LoadByRow(SharedArray<float> to,
                                 const HeadRows<const T>& from, int begin,
                                 int column) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kPlainRows * kPlainColumns;
       i += kPlainThreads) {
    const int row = i / kPlainColumns, c = i % kPlainColumns;
    to[row * kPlainPitch + c] = PlainElement(from, begin + row, column + c);
  }
}

// Whose rows are multiplied: q and k, or d_out and v.
template <typename T>
struct PlainPair {
  HeadRows<const T> a, b;
};

// acc = a b^T through `room`, of 2 kPlainSide elements, which is free at the
// end. Begins with a barrier.
template <typename T>
__device__ inline void PlainRowProducts(const PlainPair<T>& pair, int a_begin,
                                        int b_begin, SharedArray<float> room,
                                        PlainProducts& acc) {
  const SharedArray<float> a = room.Slice(0, kPlainSide);
  const SharedArray<float> b = room.Slice(kPlainSide, kPlainSide);
  Clear(acc);
  for (int d = 0; d < pair.a.head_dim; d += kPlainDepth) {
    __syncthreads();
    LoadByDepth(a, pair.a, a_begin, d);
    LoadByDepth(b, pair.b, b_begin, d);
    __syncthreads();
    AddPlainProduct(a, b, std::min(int{kPlainDepth}, pair.a.head_dim - d), acc);
  }
}

// Puts what the thread holds by column, then row: the left side of a product
// over columns.
__device__ inline void StoreByColumn(const PlainProducts& values,
                                     SharedArray<float> to) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    Pack<float, 4> column;
#pragma unroll
    for (int i = 0; i < 4; ++i) column.element[i] = values[i][j];
    to.Store((Across() + j) * kPlainPitch + Down(), column);
  }
}

// acc[part] += left times rows `begin` on of `from`, whose columns `column` on
// are the block's; room is of kPlainTile elements. A barrier parts `left` from
// its writes; begins with one.
template <typename T>
__device__ inline void AddPlainRows(SharedArray<float> left,
                                    const HeadRows<const T>& from, int begin,
                                    int column, SharedArray<float> room,
                                    PlainProducts (&acc)[kPlainParts]) {
  const int rows = std::min(int{kPlainRows}, from.length - begin);
#pragma unroll
  for (int part = 0; part < kPlainParts; ++part) {
    const int at = column + part * kPlainColumns;
    if (at >= from.head_dim) break;
    __syncthreads();
    LoadByRow(room, from, begin, at);
    __syncthreads();
    AddPlainProduct(left, room, rows, acc[part]);
  }
}

// Writes the block's columns of rows `begin` on.
template <typename T>
__device__ inline void StorePlainRows(const PlainProducts (&acc)[kPlainParts],
                                      const HeadRows<T>& to, int begin,
                                      int column) {
#pragma unroll
  for (int part = 0; part < kPlainParts; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = begin + Down() + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = column + part * kPlainColumns + Across() + j;
        if (row < to.length && c < to.head_dim)
          to.Row(row)[c] = T(acc[part][i][j]);
      }
    }
  }
}

}  // namespace gradwire
