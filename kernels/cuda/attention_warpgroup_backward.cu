// SPDX-License-Identifier: Apache-2.0
// The gradient of attention in bf16 on the warpgroups of sm_90a: the two passes
// of attention_gradient.h, with 64 rows a warpgroup. All sums stay in
// registers; the scores' gradients are the left sides of the last products as
// they lie there, so nothing goes through shared memory but what was loaded.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "device/cuda/warpgroup.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_scores_gradient.h"
#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/attention_warpgroup.h"

namespace gradwire {
namespace {

// kRing: tiles of each kind that are there at once.
template <int kDim_, int kRing_>
struct WideGradient {
  static constexpr int kDim = kDim_;
  static constexpr int kRing = kRing_;
  // Rows of a streamed tile.
  static constexpr int kStreamed = 64;
  using Own = SwizzledTile<kWideRows, kDim>;
  using Streamed = SwizzledTile<kStreamed, kDim>;
  using Ring = TileRing<Streamed, kRing>;
  using Scores = Accumulator<1, kStreamed / 8>;
  using Left = LeftSide<1, kStreamed / 16>;
  using Sums = Accumulator<1, kDim / 8>;
  static constexpr std::size_t kTileBytes =
      sizeof(BFloat16) * (2 * Own::kElements + 2 * kRing * Streamed::kElements);
  // Of d_k and d_v alone.
  static constexpr std::size_t kStatsBytes =
      sizeof(AttentionRowStats) * kRing * kStreamed;
  static_assert(kTileBytes + kStatsBytes <= std::size_t{227} << 10);
};

// While the gradient of one tile's scores is made and multiplied, the scores of
// the next are on their way, and the tile after that comes in.
template <int kDim>
using WideQueryGradient = WideGradient<kDim, 3>;
// Whose sums take the registers that the next scores would need.
template <int kDim>
using WideKeyGradient = WideGradient<kDim, 2>;

// d_q: owns q and d_out, streams k and v.
template <class Shape>
__global__ void __launch_bounds__(kWideThreads, 1)
    WideQueryGradientKernel(AttentionGradArgs<BFloat16> args) {
  if constexpr (kHasWarpgroups) {
    SharedMemory memory;
    const auto q = TakeTile<typename Shape::Own>(memory);
    const auto d_out = TakeTile<typename Shape::Own>(memory);
    const typename Shape::Ring k(memory), v(memory);

    const int head = static_cast<int>(blockIdx.x) % args.heads;
    const AttentionTile tile =
        args.tiles[static_cast<int>(blockIdx.x) / args.heads];
    const int kv_head = head / args.group();
    const auto keys = args.InQkv(args.qkv, tile, args.KeyPlace(kv_head));
    const auto values = args.InQkv(args.qkv, tile, args.ValuePlace(kv_head));
    const int row = WarpOfBlock() * 16;
    const int first_row = WarpgroupOfBlock() * kRowsPerWarpgroup;
    const int first_query = tile.begin + row;
    const int num_keys = std::min(tile.begin + kWideRows, tile.length);
    const int steps = (num_keys + Shape::kStreamed - 1) / Shape::kStreamed;
    const float scale_log2 = args.scale * kLog2E;

    const auto load = [&](int step) {
      LoadSwizzled(k[step], keys, step * Shape::kStreamed);
      LoadSwizzled(v[step], values, step * Shape::kStreamed);
    };
    LoadSwizzled(q, args.InQkv(args.qkv, tile, head), tile.begin);
    LoadSwizzled(d_out, args.InOut(args.d_out, tile, head), tile.begin);
    load(0);
    CommitAsync();
    if (steps > 1) load(1);
    CommitAsync();

    RowStats<1> stats;
    LoadStats(args.Stats(tile, head), first_query, tile.length, stats);
    typename Shape::Scores scores, d_p, next_scores, next_d_p;
    typename Shape::Left d_scores;
    typename Shape::Sums d_q;
    Clear(d_q);
    const auto queue_scores = [&](int step) {
      BeginProducts();
      QueueRowProducts(q, first_row, k[step], next_scores);
      QueueRowProducts(d_out, first_row, v[step], next_d_p);
      CommitProducts();
    };
    const auto queue_gradient = [&](int step) {
      const int first_key = step * Shape::kStreamed;
      ScoreGradient(stats, scale_log2, d_p, scores);
      if (first_key + Shape::kStreamed - 1 > first_query) {
        SetLaterKeys(first_query, first_key, 0.0f, scores);
      }
      Round(scores, d_scores);
      BeginProducts();
      QueueProduct(d_scores, k[step], d_q);
      CommitProducts();
    };
    const auto wait = [&] {
      WaitProducts<0>();
      HoldSums(d_q[0]);
      HoldSums(next_scores[0]);
      HoldSums(next_d_p[0]);
      Copy(next_scores, scores);
      Copy(next_d_p, d_p);
    };

    WaitAsync<1>();
    ShareLoads();
    queue_scores(0);
    wait();
    for (int step = 0; step + 1 < steps; ++step) {
      WaitAsync<0>();
      ShareLoads();
      // In place of the keys of the step before.
      if (step + 2 < steps) load(step + 2);
      CommitAsync();
      queue_scores(step + 1);
      queue_gradient(step);
      wait();
    }
    queue_gradient(steps - 1);
    WaitProducts<0>();
    HoldSums(d_q[0]);
    Scale(args.scale, d_q);
    __syncthreads();
    StoreSwizzled(d_q, q, row, tile.begin, args.InQkv(args.d_qkv, tile, head));
  }
}

// d_k and d_v: owns k and v, streams q and d_out of the group's heads in turn.
template <class Shape>
__global__ void __launch_bounds__(kWideThreads, 1)
    WideKeyGradientKernel(AttentionGradArgs<BFloat16> args) {
  if constexpr (kHasWarpgroups) {
    SharedMemory memory;
    const auto k = TakeTile<typename Shape::Own>(memory);
    const auto v = TakeTile<typename Shape::Own>(memory);
    const typename Shape::Ring q(memory), d_out(memory);
    const auto all_stats =
        memory.Take<AttentionRowStats>(Shape::kRing * Shape::kStreamed);

    const int kv_head = static_cast<int>(blockIdx.x) % args.kv_heads;
    const AttentionTile tile =
        args.tiles[static_cast<int>(blockIdx.x) / args.kv_heads];
    const int row = WarpOfBlock() * 16;
    const int first_row = WarpgroupOfBlock() * kRowsPerWarpgroup;
    const int first_key = tile.begin + row;
    // A head's tiles of queries begin at the block's first key.
    const int steps_per_head =
        (tile.length - tile.begin + Shape::kStreamed - 1) / Shape::kStreamed;
    const int steps = steps_per_head * args.group();
    const float scale_log2 = args.scale * kLog2E;

    // Of the tile that is loaded next; a head's follow each other.
    int head = kv_head * args.group(), to_load = tile.begin;
    const auto load = [&](int step) {
      LoadSwizzled(q[step], args.InQkv(args.qkv, tile, head), to_load);
      LoadSwizzled(d_out[step], args.InOut(args.d_out, tile, head), to_load);
      const int i = static_cast<int>(threadIdx.x);
      if (i < Shape::kStreamed) {
        CopyAsync8(all_stats, step % Shape::kRing * Shape::kStreamed + i,
                   args.Stats(tile, head) + to_load + i,
                   to_load + i < tile.length);
      }
      to_load += Shape::kStreamed;
      if (to_load >= tile.length) {
        to_load = tile.begin;
        ++head;
      }
    };
    LoadSwizzled(k, args.InQkv(args.qkv, tile, args.KeyPlace(kv_head)),
                 tile.begin);
    LoadSwizzled(v, args.InQkv(args.qkv, tile, args.ValuePlace(kv_head)),
                 tile.begin);
    load(0);
    CommitAsync();

    typename Shape::Sums d_k, d_v;
    Clear(d_k);
    Clear(d_v);
    int next_query = tile.begin;
    for (int step = 0; step < steps; ++step) {
      const int first_query = next_query;
      next_query += Shape::kStreamed;
      if (next_query >= tile.length) next_query = tile.begin;
      WaitAsync<0>();
      ShareLoads();
      if (step + 1 < steps) load(step + 1);
      CommitAsync();
      // The warpgroup's keys come after all of these queries.
      if (first_query + Shape::kStreamed <= tile.begin + first_row) continue;
      const SharedColumnStats stats = {all_stats.Slice(
          step % Shape::kRing * Shape::kStreamed, Shape::kStreamed)};
      typename Shape::Scores p, d_p;
      typename Shape::Left left_p, left_scores;
      BeginProducts();
      QueueRowProducts(k, first_row, q[step], p);
      CommitProducts();
      BeginProducts();
      QueueRowProducts(v, first_row, d_out[step], d_p);
      CommitProducts();
      WaitProducts<1>();
      HoldSums(p[0]);
      Probabilities(stats, scale_log2, p);
      if (first_query < first_key + 15 ||
          first_query + Shape::kStreamed > tile.length) {
        ClearUnseen(first_query - first_key, tile.length - first_query, p);
      }
      Round(p, left_p);
      BeginProducts();
      QueueProduct(left_p, d_out[step], d_v);
      CommitProducts();
      WaitProducts<1>();
      HoldSums(d_p[0]);
      ScoreGradient(stats, p, d_p);
      Round(d_p, left_scores);
      BeginProducts();
      QueueProduct(left_scores, q[step], d_k);
      CommitProducts();
      WaitProducts<0>();
      HoldSums(d_v[0]);
      HoldSums(d_k[0]);
    }
    Scale(args.scale, d_k);
    __syncthreads();
    StoreSwizzled(d_k, k, row, tile.begin,
                  args.InQkv(args.d_qkv, tile, args.KeyPlace(kv_head)));
    StoreSwizzled(d_v, v, row, tile.begin,
                  args.InQkv(args.d_qkv, tile, args.ValuePlace(kv_head)));
  }
}

}  // namespace

cudaError_t AttentionQueryGradientOnWarpgroups(
    const AttentionCall& call, AttentionGradArgs<BFloat16> args) {
  return WithPanels(args.head_dim, [&]<int kDim>() {
    using Shape = WideQueryGradient<kDim>;
    TilesOnDevice tiles;
    const cudaError_t error =
        call.Tiles(kWideRows, AttentionWork::kKeysBefore, tiles);
    if (error != cudaSuccess) return error;
    args.tiles = tiles.data;
    return LaunchWarpgroups(WideQueryGradientKernel<Shape>,
                            GridOf(tiles.count, args.heads), dim3(kWideThreads),
                            Shape::kTileBytes, call.stream, args);
  });
}

cudaError_t AttentionKeyGradientOnWarpgroups(const AttentionCall& call,
                                             AttentionGradArgs<BFloat16> args) {
  return WithPanels(args.head_dim, [&]<int kDim>() {
    using Shape = WideKeyGradient<kDim>;
    TilesOnDevice tiles;
    const cudaError_t error =
        call.Tiles(kWideRows, AttentionWork::kQueriesAfter, tiles);
    if (error != cudaSuccess) return error;
    args.tiles = tiles.data;
    return LaunchWarpgroups(
        WideKeyGradientKernel<Shape>, GridOf(tiles.count, args.kv_heads),
        dim3(kWideThreads), Shape::kTileBytes + Shape::kStatsBytes, call.stream,
        args);
  });
}

}  // namespace gradwire
