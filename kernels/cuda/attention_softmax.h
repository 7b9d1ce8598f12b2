// SPDX-License-Identifier: Apache-2.0
// The softmax of attention over tiles of keys, of scores in a warp's registers
// (attention_tiles.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// By what the sums so far of each of the lane's rows are to be multiplied.
template <int kRowTiles>
using Shrinkage = float[kRowTiles][2];

// Of the warp's rows: lane l knows of rows 16 r + 8 h + l / 4.
template <int kRowTiles>
struct Softmax {
  float max[kRowTiles][2];  // of the scores so far, before `scale`
  float sum[kRowTiles][2];  // of the lane's exponentials alone

  __device__ Softmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      max[r][0] = max[r][1] = kMinusInfinity;
      sum[r][0] = sum[r][1] = 0.0f;
    }
  }

  // scores = exp(scale * (scores - the new max)).
  template <int kColumnTiles>
  __device__ void Update(float scale_log2,
                         Accumulator<kRowTiles, kColumnTiles>& scores,
                         Shrinkage<kRowTiles>& shrinkage) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = max[r][h];
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          most =
              fmaxf(most, fmaxf(scores[r][n][2 * h], scores[r][n][2 * h + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        const float shrink = Exp2Approx((max[r][h] - most) * scale_log2);
        max[r][h] = most;
        const float offset = -most * scale_log2;
        float total = sum[r][h] * shrink;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            scores[r][n][i] =
                Exp2Approx(fmaf(scores[r][n][i], scale_log2, offset));
            total += scores[r][n][i];
          }
        }
        sum[r][h] = total;
        shrinkage[r][h] = shrink;
      }
    }
  }

  // out /= the sum of its row, of all lanes; writes lse. `begin` is the first
  // row of the warp, of the tile's sequence.
  template <int kOutTiles>
  __device__ void Finish(const AttentionForwardArgs<BFloat16>& args,
                         const AttentionTile& tile, int head, int begin,
                         Accumulator<kRowTiles, kOutTiles>& out) const {
    const int lane = LaneOfWarp();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float total = sum[r][h];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        const float factor = 1.0f / total;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          out[r][n][2 * h] *= factor;
          out[r][n][2 * h + 1] *= factor;
        }
        const int query = begin + r * 16 + h * 8 + lane / 4;
        if (lane % 4 == 0 && query < tile.length) {
          args.lse[(int64_t{tile.first} + query) * args.heads + head] =
              fmaf(max[r][h], args.scale, logf(total));
        }
      }
    }
  }
};

template <int kRowTiles, int kOutTiles>
__device__ inline void Shrink(const Shrinkage<kRowTiles>& shrinkage,
                              Accumulator<kRowTiles, kOutTiles>& out) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[r][n][i] *= shrinkage[r][i / 2];
    }
  }
}

}  // namespace gradwire
