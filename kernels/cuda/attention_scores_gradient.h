// SPDX-License-Identifier: Apache-2.0
// From scores to their gradient, in a warp's registers (attention_tiles.h).
#pragma once

#include <algorithm>
#include <cmath>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_tiles.h"

namespace gradwire {

// ---- Queries by keys: the stats are of the lane's rows ----------------------

template <int kRowTiles>
using RowStats = AttentionRowStats[kRowTiles][2];

template <int kRowTiles>
__device__ inline void LoadStats(const AttentionRowStats* from, int first_query,
                                 int length, RowStats<kRowTiles>& stats) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = first_query + r * 16 + h * 8 + LaneOfWarp() / 4;
      stats[r][h] = from[std::min(query, length - 1)];
    }
  }
}

// scores become p (d_p - delta).
template <int kRowTiles, int kColumnTiles>
__device__ inline void ScoreGradient(
    const RowStats<kRowTiles>& stats, float scale_log2,
    const Accumulator<kRowTiles, kColumnTiles>& d_p,
    Accumulator<kRowTiles, kColumnTiles>& scores) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const AttentionRowStats& of = stats[r][i / 2];
        const float p = Exp2Approx(fmaf(scores[r][n][i], scale_log2, -of.lse2));
        scores[r][n][i] = p * (d_p[r][n][i] - of.delta);
      }
    }
  }
}

// ---- Keys by queries: the stats are of the lane's columns -------------------

// Two columns that a lane holds beside each other.
struct alignas(16) PairStats {
  AttentionRowStats column[2];
};

// stats[n]: of columns 8 n + 2 (lane % 4) and the next, in registers.
template <int kColumnTiles>
using ColumnStats = PairStats[kColumnTiles];

template <int kColumnTiles>
__device__ inline void LoadColumnStats(const AttentionRowStats* from,
                                       int first_query, int length,
                                       ColumnStats<kColumnTiles>& stats) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = first_query + n * 8 + LaneOfWarp() % 4 * 2 + i;
      stats[n].column[i] = from[std::min(query, length - 1)];
    }
  }
}

// The same, in shared memory.
struct SharedColumnStats {
  SharedArray<AttentionRowStats> columns;

  __device__ PairStats operator[](int n) const {
    return columns.Load<PairStats>(n * 8 + LaneOfWarp() % 4 * 2);
  }
};

// scores become p.
template <class Stats, int kRowTiles, int kColumnTiles>
__device__ inline void Probabilities(
    const Stats& stats, float scale_log2,
    Accumulator<kRowTiles, kColumnTiles>& scores) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    const PairStats of = stats[n];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[r][n][i] = Exp2Approx(
            fmaf(scores[r][n][i], scale_log2, -of.column[i % 2].lse2));
      }
    }
  }
}

// 0 where the key, a row, comes `query_ahead` or more after the query, a
// column, and where the query comes after the sequence.
template <int kRowTiles, int kColumnTiles>
__device__ inline void ClearUnseen(int query_ahead, int num_queries,
                                   Accumulator<kRowTiles, kColumnTiles>& p) {
  const int lane = LaneOfWarp();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i % 2;
        const int row = r * 16 + lane / 4 + i / 2 * 8;
        if (row > column + query_ahead || column >= num_queries) {
          p[r][n][i] = 0.0f;
        }
      }
    }
  }
}

// d_p becomes p (d_p - delta).
template <class Stats, int kRowTiles, int kColumnTiles>
__device__ inline void ScoreGradient(
    const Stats& stats, const Accumulator<kRowTiles, kColumnTiles>& p,
    Accumulator<kRowTiles, kColumnTiles>& d_p) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    const PairStats of = stats[n];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d_p[r][n][i] = p[r][n][i] * (d_p[r][n][i] - of.column[i % 2].delta);
      }
    }
  }
}

// -----------------------------------------------------------------------------

template <int kRowTiles, int kColumnTiles>
__device__ inline void Scale(float factor,
                             Accumulator<kRowTiles, kColumnTiles>& acc) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[r][n][i] *= factor;
    }
  }
}

}  // namespace gradwire
