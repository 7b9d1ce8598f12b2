// SPDX-License-Identifier: Apache-2.0
// Bound by float32 multiply-adds, of which a thread does 16 for two loads from
// shared memory (attention_plain.h). Softmax is online, as on tensor cores.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_plain.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {
namespace {

constexpr std::size_t kSharedBytes = 2 * kPlainTile * sizeof(float);

// Of the 16 threads that have the same rows.
__device__ inline float RowMax(float value) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}
__device__ inline float RowSum(float value) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    ForwardKernel(AttentionForwardArgs<T> args, int blocks_per_head) {
  SharedMemory memory;
  const auto room = memory.Take<float>(kPlainTile);
  const auto probabilities = memory.Take<float>(kPlainTile);

  const int part = static_cast<int>(blockIdx.x) % blocks_per_head;
  const int item = static_cast<int>(blockIdx.x) / blocks_per_head;
  const int head = item % args.heads;
  const AttentionTile tile = args.tiles[item / args.heads];
  const int kv_head = head / args.group();
  const int column = part * kPlainParts * kPlainColumns;
  const PlainPair<T> pair = {
      args.InQkv(args.qkv, tile, head),
      args.InQkv(args.qkv, tile, args.KeyPlace(kv_head))};
  const auto values = args.InQkv(args.qkv, tile, args.ValuePlace(kv_head));
  const int num_keys = std::min(tile.begin + kPlainRows, tile.length);

  float max[4], sum[4];
  PlainProducts out[kPlainParts];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    max[i] = -std::numeric_limits<float>::infinity();
    sum[i] = 0.0f;
  }
#pragma unroll
  for (int c = 0; c < kPlainParts; ++c) Clear(out[c]);

  for (int first_key = 0; first_key < num_keys; first_key += kPlainRows) {
    PlainProducts scores;
    PlainRowProducts(pair, tile.begin, first_key, room, scores);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = tile.begin + Down() + i;
      float most = max[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = first_key + Across() + j <= query
                           ? scores[i][j] * args.scale
                           : -std::numeric_limits<float>::infinity();
        most = fmaxf(most, scores[i][j]);
      }
      most = RowMax(most);
      const float shrink = expf(max[i] - most);
      max[i] = most;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = expf(scores[i][j] - most);
        total += scores[i][j];
      }
      sum[i] = sum[i] * shrink + RowSum(total);
#pragma unroll
      for (int c = 0; c < kPlainParts; ++c) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[c][i][j] *= shrink;
      }
    }
    // Those before are read: a barrier of this round's products lies between.
    StoreByColumn(scores, probabilities);
    AddPlainRows(probabilities, values, first_key, column, room, out);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = tile.begin + Down() + i;
    if (part == 0 && Across() == 0 && query < tile.length) {
      args.lse[(int64_t{tile.first} + query) * args.heads + head] =
          max[i] + logf(sum[i]);
    }
    const float factor = 1.0f / sum[i];
#pragma unroll
    for (int c = 0; c < kPlainParts; ++c) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[c][i][j] *= factor;
    }
  }
  StorePlainRows(out, args.InOut(args.out, tile, head), tile.begin, column);
}

}  // namespace

template <typename T>
cudaError_t PlainAttentionForward(const AttentionCall& call,
                                  AttentionForwardArgs<T> args) {
  TilesOnDevice tiles;
  const cudaError_t error =
      call.Tiles(kPlainRows, AttentionWork::kKeysBefore, tiles);
  if (error != cudaSuccess) return error;
  args.tiles = tiles.data;
  const int blocks_per_head = PlainBlocksPerHead(args.head_dim);
  return Launch(ForwardKernel<T>,
                GridOf(tiles.count, int64_t{args.heads} * blocks_per_head),
                dim3(kPlainThreads), kSharedBytes, call.stream, args,
                blocks_per_head);
}
template cudaError_t PlainAttentionForward<float>(const AttentionCall&,
                                                  AttentionForwardArgs<float>);
template cudaError_t PlainAttentionForward<BFloat16>(
    const AttentionCall&, AttentionForwardArgs<BFloat16>);

}  // namespace gradwire
