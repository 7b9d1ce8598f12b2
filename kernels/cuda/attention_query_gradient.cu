// SPDX-License-Identifier: Apache-2.0
// d_q, bound by the tensor cores: three products a tile. A block owns a tile of
// queries of one head (attention_gradient.h). Two row tiles a warp halve what
// it reads from shared memory, where accumulators and tiles leave room: heads
// of up to 96.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_gradient.h"
#include "kernels/cuda/attention_scores_gradient.h"

namespace gradwire {
namespace {

template <int kDim>
using QueryTile = GradientTile<kDim, kDim <= 96 ? 2 : 1, kDim <= 128 ? 32 : 16>;

template <class Tile>
__global__ void __launch_bounds__(kAttentionThreads)
    QueryGradientKernel(AttentionGradArgs<BFloat16> args) {
  constexpr int kDim = Tile::kDim;
  SharedMemory memory;
  const GradientTiles<Tile> tiles(memory);

  const int head = static_cast<int>(blockIdx.x) % args.heads;
  const AttentionTile tile =
      args.tiles[static_cast<int>(blockIdx.x) / args.heads];
  const int kv_head = head / args.group();
  const auto keys = args.InQkv(args.qkv, tile, args.KeyPlace(kv_head));
  const auto values = args.InQkv(args.qkv, tile, args.ValuePlace(kv_head));
  const int row = WarpOfBlock() * Tile::kRowsPerWarp;
  const int first_query = tile.begin + row;
  const int num_keys = std::min(tile.begin + Tile::kRows, tile.length);
  const int steps = (num_keys + Tile::kStreamed - 1) / Tile::kStreamed;
  const float scale_log2 = args.scale * kLog2E;

  const auto load = [&](int step) {
    LoadTile<kDim, Tile::kStreamed>(tiles.Streamed(0, step), keys,
                                    step * Tile::kStreamed);
    LoadTile<kDim, Tile::kStreamed>(tiles.Streamed(1, step), values,
                                    step * Tile::kStreamed);
  };
  LoadTile<kDim, Tile::kRows>(tiles.own[0], args.InQkv(args.qkv, tile, head),
                              tile.begin);
  LoadTile<kDim, Tile::kRows>(tiles.own[1], args.InOut(args.d_out, tile, head),
                              tile.begin);
  load(0);
  CommitAsync();

  RowStats<Tile::kRowTiles> stats;
  LoadStats(args.Stats(tile, head), first_query, tile.length, stats);
  Accumulator<Tile::kRowTiles, kDim / 8> d_q;
  Clear(d_q);
  for (int step = 0; step < steps; ++step) {
    const int first_key = step * Tile::kStreamed;
    WaitAsync<0>();
    // The other buffers are free: all warps are done with the step before.
    __syncthreads();
    if (step + 1 < steps) load(step + 1);
    CommitAsync();
    if (first_key >= first_query + Tile::kRowsPerWarp) continue;
    const Bf16Tile k = tiles.Streamed(0, step);
    Accumulator<Tile::kRowTiles, Tile::kColumnTiles> scores, d_p;
    Clear(scores);
    AddRowProducts<kDim>(tiles.own[0], row, k, scores);
    Clear(d_p);
    AddRowProducts<kDim>(tiles.own[1], row, tiles.Streamed(1, step), d_p);
    ScoreGradient(stats, scale_log2, d_p, scores);
    if (first_key + Tile::kStreamed - 1 > first_query) {
      SetLaterKeys(first_query, first_key, 0.0f, scores);
    }
    LeftSide<Tile::kRowTiles, Tile::kColumnTiles / 2> d_scores;
    Round(scores, d_scores);
    AddProduct<kDim>(d_scores, k, d_q);
  }
  Scale(args.scale, d_q);
  StoreRows<kDim>(d_q, tiles.own[0], row, tile.begin,
                  args.InQkv(args.d_qkv, tile, head));
}

}  // namespace

cudaError_t AttentionQueryGradient(const AttentionCall& call,
                                   AttentionGradArgs<BFloat16> args) {
  return WithPaddedHeadDim(args.head_dim, [&]<int kDim>() {
    using Tile = QueryTile<kDim>;
    TilesOnDevice tiles;
    const cudaError_t error =
        call.Tiles(Tile::kRows, AttentionWork::kKeysBefore, tiles);
    if (error != cudaSuccess) return error;
    args.tiles = tiles.data;
    return Launch(QueryGradientKernel<Tile>, GridOf(tiles.count, args.heads),
                  dim3(kAttentionThreads), Tile::kSharedBytes, call.stream,
                  args);
  });
}

}  // namespace gradwire
