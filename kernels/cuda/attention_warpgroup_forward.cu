// SPDX-License-Identifier: Apache-2.0
// Attention in bf16 on the warpgroups of sm_90a. As in attention_forward.cu a
// block owns a tile of queries of one head and goes through the keys before its
// last query. The scores of the next tile of keys are made while the values of
// this one are summed, and become exponentials meanwhile; the block's other
// warpgroup keeps the tensor cores busy when this one does not.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "device/cuda/warpgroup.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_softmax.h"
#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/attention_warpgroup.h"

namespace gradwire {
namespace {

template <int kDim_>
struct WideForward {
  static constexpr int kDim = kDim_;
  static constexpr int kKeys = 128;
  using Queries = SwizzledTile<kWideRows, kDim>;
  using Keys = SwizzledTile<kKeys, kDim>;
  static constexpr std::size_t kSharedBytes =
      sizeof(BFloat16) * (Queries::kElements + 4 * Keys::kElements);
  static_assert(kSharedBytes <= std::size_t{227} << 10);
};

template <class Shape>
__global__ void __launch_bounds__(kWideThreads, 1)
    WideForwardKernel(AttentionForwardArgs<BFloat16> args) {
  if constexpr (kHasWarpgroups) {
    using Keys = typename Shape::Keys;
    SharedMemory memory;
    const auto q = TakeTile<typename Shape::Queries>(memory);
    const TileRing<Keys, 2> k(memory), v(memory);

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
    const int steps = (num_keys + Shape::kKeys - 1) / Shape::kKeys;
    const float scale_log2 = args.scale * kLog2E;

    LoadSwizzled(q, args.InQkv(args.qkv, tile, head), tile.begin);
    LoadSwizzled(k[0], keys, 0);
    CommitAsync();
    LoadSwizzled(v[0], values, 0);
    if (steps > 1) LoadSwizzled(k[1], keys, Shape::kKeys);
    CommitAsync();

    Softmax<1> softmax;
    Shrinkage<1> shrinkage;
    Accumulator<1, Shape::kKeys / 8> scores;
    LeftSide<1, Shape::kKeys / 16> p;
    Accumulator<1, Shape::kDim / 8> out;
    Clear(out);
    const auto exponentiate = [&](int step) {
      const int first_key = step * Shape::kKeys;
      if (first_key + Shape::kKeys - 1 > first_query) {
        SetLaterKeys(first_query, first_key, kMinusInfinity, scores);
      }
      softmax.Update(scale_log2, scores, shrinkage);
    };

    WaitAsync<1>();
    ShareLoads();
    BeginProducts();
    QueueRowProducts(q, first_row, k[0], scores);
    CommitProducts();
    WaitProducts<0>();
    HoldSums(scores[0]);
    exponentiate(0);
    Round(scores, p);
    for (int step = 0; step + 1 < steps; ++step) {
      WaitAsync<0>();
      ShareLoads();
      // The keys of this step and the values of the one before are used.
      if (step + 2 < steps) {
        LoadSwizzled(k[step], keys, (step + 2) * Shape::kKeys);
      }
      LoadSwizzled(v[step + 1], values, (step + 1) * Shape::kKeys);
      CommitAsync();
      BeginProducts();
      QueueRowProducts(q, first_row, k[step + 1], scores);
      CommitProducts();
      BeginProducts();
      QueueProduct(p, v[step], out);
      CommitProducts();
      WaitProducts<1>();
      HoldSums(scores[0]);
      exponentiate(step + 1);
      ComputeBeforeWaiting(softmax.sum[0][0] + softmax.sum[0][1]);
      WaitProducts<0>();
      HoldSums(out[0]);
      Shrink(shrinkage, out);
      Round(scores, p);
    }
    WaitAsync<0>();
    ShareLoads();
    BeginProducts();
    QueueProduct(p, v[steps - 1], out);
    CommitProducts();
    WaitProducts<0>();
    HoldSums(out[0]);
    softmax.Finish(args, tile, head, first_query, out);
    __syncthreads();
    StoreSwizzled(out, q, row, tile.begin, args.InOut(args.out, tile, head));
  }
}

}  // namespace

cudaError_t AttentionForwardOnWarpgroups(const AttentionCall& call,
                                         AttentionForwardArgs<BFloat16> args) {
  return WithPanels(args.head_dim, [&]<int kDim>() {
    using Shape = WideForward<kDim>;
    TilesOnDevice tiles;
    const cudaError_t error =
        call.Tiles(kWideRows, AttentionWork::kKeysBefore, tiles);
    if (error != cudaSuccess) return error;
    args.tiles = tiles.data;
    return LaunchWarpgroups(WideForwardKernel<Shape>,
                            GridOf(tiles.count, args.heads), dim3(kWideThreads),
                            Shape::kSharedBytes, call.stream, args);
  });
}

}  // namespace gradwire
