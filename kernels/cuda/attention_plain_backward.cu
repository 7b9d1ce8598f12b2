// SPDX-License-Identifier: Apache-2.0
// The gradient of attention in float32 (attention_plain.h): a pass of blocks of
// queries for d_q, one of blocks of keys for d_k and d_v, each with scores of
// its own, so that no two blocks add to one sum.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_plain.h"

namespace gradwire {
namespace {

constexpr std::size_t kQuerySharedBytes = 2 * kPlainTile * sizeof(float);
constexpr std::size_t kKeySharedBytes = 3 * kPlainTile * sizeof(float);

// p of query and key, 0 where the key is not seen.
__device__ inline float Probability(float product, float scale_log2, float lse2,
                                    bool seen) {
  return seen ? exp2f(fmaf(product, scale_log2, -lse2)) : 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    QueryKernel(AttentionGradArgs<T> args, int blocks_per_head) {
  SharedMemory memory;
  const auto room = memory.Take<float>(kPlainTile);
  const auto d_scores = memory.Take<float>(kPlainTile);

  const int part = static_cast<int>(blockIdx.x) % blocks_per_head;
  const int item = static_cast<int>(blockIdx.x) / blocks_per_head;
  const int head = item % args.heads;
  const AttentionTile tile = args.tiles[item / args.heads];
  const int kv_head = head / args.group();
  const int column = part * kPlainParts * kPlainColumns;
  const auto keys = args.InQkv(args.qkv, tile, args.KeyPlace(kv_head));
  const PlainPair<T> scores_of = {args.InQkv(args.qkv, tile, head), keys};
  const PlainPair<T> d_p_of = {
      args.InOut(args.d_out, tile, head),
      args.InQkv(args.qkv, tile, args.ValuePlace(kv_head))};
  const float scale_log2 = args.scale * kLog2E;
  const int num_keys = std::min(tile.begin + kPlainRows, tile.length);

  AttentionRowStats stats[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = std::min(tile.begin + Down() + i, tile.length - 1);
    stats[i] = args.Stats(tile, head)[query];
  }
  PlainProducts d_q[kPlainParts];
#pragma unroll
  for (int c = 0; c < kPlainParts; ++c) Clear(d_q[c]);

  for (int first_key = 0; first_key < num_keys; first_key += kPlainRows) {
    PlainProducts s, d_p;
    PlainRowProducts(scores_of, tile.begin, first_key, room, s);
    PlainRowProducts(d_p_of, tile.begin, first_key, room, d_p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = tile.begin + Down() + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool seen = first_key + Across() + j <= query;
        const float p = Probability(s[i][j], scale_log2, stats[i].lse2, seen);
        s[i][j] = args.scale * p * (d_p[i][j] - stats[i].delta);
      }
    }
    StoreByColumn(s, d_scores);
    AddPlainRows(d_scores, keys, first_key, column, room, d_q);
  }
  StorePlainRows(d_q, args.InQkv(args.d_qkv, tile, head), tile.begin, column);
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    KeyKernel(AttentionGradArgs<T> args, int blocks_per_head) {
  SharedMemory memory;
  const auto room = memory.Take<float>(kPlainTile);
  const auto probabilities = memory.Take<float>(kPlainTile);
  const auto d_scores = memory.Take<float>(kPlainTile);

  const int part = static_cast<int>(blockIdx.x) % blocks_per_head;
  const int item = static_cast<int>(blockIdx.x) / blocks_per_head;
  const int kv_head = item % args.kv_heads;
  const AttentionTile tile = args.tiles[item / args.kv_heads];
  const int column = part * kPlainParts * kPlainColumns;
  const auto keys = args.InQkv(args.qkv, tile, args.KeyPlace(kv_head));
  const auto values = args.InQkv(args.qkv, tile, args.ValuePlace(kv_head));
  const float scale_log2 = args.scale * kLog2E;

  PlainProducts d_k[kPlainParts], d_v[kPlainParts];
#pragma unroll
  for (int c = 0; c < kPlainParts; ++c) {
    Clear(d_k[c]);
    Clear(d_v[c]);
  }
  for (int g = 0; g < args.group(); ++g) {
    const int head = kv_head * args.group() + g;
    const auto queries = args.InQkv(args.qkv, tile, head);
    const auto d_out = args.InOut(args.d_out, tile, head);
    const AttentionRowStats* stats = args.Stats(tile, head);
    // Keys are as many rows as queries, so the first queries are the keys' own.
    for (int first_query = tile.begin; first_query < tile.length;
         first_query += kPlainRows) {
      // Rows are keys, columns queries.
      PlainProducts s, d_p;
      PlainRowProducts(PlainPair<T>{keys, queries}, tile.begin, first_query,
                       room, s);
      PlainRowProducts(PlainPair<T>{values, d_out}, tile.begin, first_query,
                       room, d_p);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int query = first_query + Across() + j;
        const AttentionRowStats of = stats[std::min(query, tile.length - 1)];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool seen =
              query < tile.length && tile.begin + Down() + i <= query;
          s[i][j] = Probability(s[i][j], scale_log2, of.lse2, seen);
          d_p[i][j] = args.scale * s[i][j] * (d_p[i][j] - of.delta);
        }
      }
      StoreByColumn(s, probabilities);
      StoreByColumn(d_p, d_scores);
      AddPlainRows(probabilities, d_out, first_query, column, room, d_v);
      AddPlainRows(d_scores, queries, first_query, column, room, d_k);
    }
  }
  StorePlainRows(d_k, args.InQkv(args.d_qkv, tile, args.KeyPlace(kv_head)),
                 tile.begin, column);
  StorePlainRows(d_v, args.InQkv(args.d_qkv, tile, args.ValuePlace(kv_head)),
                 tile.begin, column);
}

}  // namespace

template <typename T>
cudaError_t PlainAttentionBackward(const AttentionCall& call,
                                   const AttentionGradArgs<T>& args) {
  const int blocks_per_head = PlainBlocksPerHead(args.head_dim);
  const auto pass = [&](AttentionWork work, int64_t heads,
                        std::size_t shared_bytes, auto kernel) {
    TilesOnDevice tiles;
    const cudaError_t error = call.Tiles(kPlainRows, work, tiles);
    if (error != cudaSuccess) return error;
    AttentionGradArgs<T> of_pass = args;
    of_pass.tiles = tiles.data;
    return Launch(kernel, GridOf(tiles.count, heads * blocks_per_head),
                  dim3(kPlainThreads), shared_bytes, call.stream, of_pass,
                  blocks_per_head);
  };
  const cudaError_t error = pass(AttentionWork::kKeysBefore, args.heads,
                                 kQuerySharedBytes, &QueryKernel<T>);
  if (error != cudaSuccess) return error;
  return pass(AttentionWork::kQueriesAfter, args.kv_heads, kKeySharedBytes,
              &KeyKernel<T>);
}
template cudaError_t PlainAttentionBackward<float>(
    const AttentionCall&, const AttentionGradArgs<float>&);
template cudaError_t PlainAttentionBackward<BFloat16>(
    const AttentionCall&, const AttentionGradArgs<BFloat16>&);

}  // namespace gradwire
