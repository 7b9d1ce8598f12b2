// SPDX-License-Identifier: Apache-2.0
// d_k and d_v, bound by the tensor cores: four products a tile. A block owns a
// tile of keys and values of one key-value head (attention_gradient.h) and goes
// through the queries after its first key, of each head of the group in turn.
// Scores are made with keys as rows, so that p and its gradient are, as they
// lie in registers, the left sides of d_v and d_k.
//
// Two row tiles a warp up to heads of 64, which streams 16 queries at a time to
// keep all sums in registers. Heads of more than 128 do not have
// room for both sums: one kernel for d_v, one for d_k, five products in all.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_gradient.h"
#include "kernels/cuda/attention_scores_gradient.h"

namespace gradwire {
namespace {

template <int kDim>
using KeyTile =
    GradientTile<kDim, kDim <= 64 ? 2 : 1, kDim == 64 || kDim == 256 ? 16 : 32>;

// Which sums a kernel makes.
enum class Sums { kBoth, kKeys, kValues };

template <class Tile, Sums kSums>
__global__ void __launch_bounds__(kAttentionThreads)
    KeyGradientKernel(AttentionGradArgs<BFloat16> args) {
  constexpr int kDim = Tile::kDim;
  SharedMemory memory;
  const GradientTiles<Tile> tiles(memory);

  const int kv_head = static_cast<int>(blockIdx.x) % args.kv_heads;
  const AttentionTile tile =
      args.tiles[static_cast<int>(blockIdx.x) / args.kv_heads];
  const int row = WarpOfBlock() * Tile::kRowsPerWarp;
  const int first_key = tile.begin + row;
  // A head's tiles of queries begin at the block's first key.
  const int steps_per_head =
      (tile.length - tile.begin + Tile::kStreamed - 1) / Tile::kStreamed;
  const int steps = steps_per_head * args.group();
  const float scale_log2 = args.scale * kLog2E;

  const auto head_of = [&](int step) {
    return kv_head * args.group() + step / steps_per_head;
  };
  const auto first_query_of = [&](int step) {
    return tile.begin + step % steps_per_head * Tile::kStreamed;
  };
  const auto load = [&](int step) {
    const int head = head_of(step), first_query = first_query_of(step);
    LoadTile<kDim, Tile::kStreamed>(
        tiles.Streamed(0, step), args.InQkv(args.qkv, tile, head), first_query);
    LoadTile<kDim, Tile::kStreamed>(tiles.Streamed(1, step),
                                    args.InOut(args.d_out, tile, head),
                                    first_query);
  };
  LoadTile<kDim, Tile::kRows>(
      tiles.own[0], args.InQkv(args.qkv, tile, args.KeyPlace(kv_head)),
      tile.begin);
  LoadTile<kDim, Tile::kRows>(
      tiles.own[1], args.InQkv(args.qkv, tile, args.ValuePlace(kv_head)),
      tile.begin);
  load(0);
  CommitAsync();

  Accumulator<Tile::kRowTiles, kDim / 8> d_k, d_v;
  Clear(d_k);
  Clear(d_v);
  for (int step = 0; step < steps; ++step) {
    const int first_query = first_query_of(step);
    WaitAsync<0>();
    // The other buffers are free: all warps are done with the step before.
    __syncthreads();
    if (step + 1 < steps) load(step + 1);
    CommitAsync();
    if (first_query + Tile::kStreamed <= first_key) continue;
    const Bf16Tile q = tiles.Streamed(0, step);
    const Bf16Tile d_out = tiles.Streamed(1, step);
    ColumnStats<Tile::kColumnTiles> stats;
    LoadColumnStats(args.Stats(tile, head_of(step)), first_query, tile.length,
                    stats);

    Accumulator<Tile::kRowTiles, Tile::kColumnTiles> p;
    LeftSide<Tile::kRowTiles, Tile::kColumnTiles / 2> left;
    Clear(p);
    AddRowProducts<kDim>(tiles.own[0], row, q, p);
    Probabilities(stats, scale_log2, p);
    if (first_query < first_key + Tile::kRowsPerWarp - 1 ||
        first_query + Tile::kStreamed > tile.length) {
      ClearUnseen(first_query - first_key, tile.length - first_query, p);
    }
    if constexpr (kSums != Sums::kKeys) {
      Round(p, left);
      AddProduct<kDim>(left, d_out, d_v);
    }
    if constexpr (kSums != Sums::kValues) {
      Accumulator<Tile::kRowTiles, Tile::kColumnTiles> d_p;
      Clear(d_p);
      AddRowProducts<kDim>(tiles.own[1], row, d_out, d_p);
      ScoreGradient(stats, p, d_p);
      Round(d_p, left);
      AddProduct<kDim>(left, q, d_k);
    }
  }
  if constexpr (kSums != Sums::kValues) {
    Scale(args.scale, d_k);
    StoreRows<kDim>(d_k, tiles.own[0], row, tile.begin,
                    args.InQkv(args.d_qkv, tile, args.KeyPlace(kv_head)));
  }
  if constexpr (kSums != Sums::kKeys) {
    StoreRows<kDim>(d_v, tiles.own[1], row, tile.begin,
                    args.InQkv(args.d_qkv, tile, args.ValuePlace(kv_head)));
  }
}

}  // namespace

cudaError_t AttentionKeyGradient(const AttentionCall& call,
                                 AttentionGradArgs<BFloat16> args) {
  return WithPaddedHeadDim(args.head_dim, [&]<int kDim>() {
    using Tile = KeyTile<kDim>;
    TilesOnDevice tiles;
    cudaError_t error =
        call.Tiles(Tile::kRows, AttentionWork::kQueriesAfter, tiles);
    if (error != cudaSuccess) return error;
    args.tiles = tiles.data;
    const auto launch = [&](auto kernel) {
      return Launch(kernel, GridOf(tiles.count, args.kv_heads),
                    dim3(kAttentionThreads), Tile::kSharedBytes, call.stream,
                    args);
    };
    if constexpr (kDim <= 128) {
      return launch(&KeyGradientKernel<Tile, Sums::kBoth>);
    } else {
      error = launch(&KeyGradientKernel<Tile, Sums::kValues>);
      if (error != cudaSuccess) return error;
      return launch(&KeyGradientKernel<Tile, Sums::kKeys>);
    }
  });
}

}  // namespace gradwire
