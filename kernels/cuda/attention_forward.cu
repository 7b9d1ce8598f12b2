// SPDX-License-Identifier: Apache-2.0
// Attention in bf16, bound by the tensor cores. A block owns a tile of queries
// of one head and goes through the keys before its last query; scores live in
// registers only. Keys and values take turns: values come in while scores are
// made of the keys, the next keys while the values are summed. One buffer of
// each leaves room for a tile of 32 queries per warp, so that what a warp reads
// from shared memory serves two products, and two blocks fit an SM. Heads of
// more than 128 have accumulators for 16 queries per warp, and from 128 on a
// tile of keys is 32, not 64: nothing is spilled.
//
// A block's heads come before its tiles in the grid: neighbours in time share
// keys and values of a group in the cache.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_plain.h"
#include "kernels/cuda/attention_softmax.h"
#include "kernels/cuda/attention_tiles.h"
#include "kernels/cuda/attention_warpgroup.h"
#include "kernels/cuda/cuda_kernels_impl.h"

namespace gradwire {
namespace {

template <int kDim_>
struct ForwardTile {
  static constexpr int kDim = kDim_;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kRowsPerWarp = 16 * kRowTiles;
  static constexpr int kRows = kAttentionWarps * kRowsPerWarp;
  static constexpr int kKeys = kDim <= 96 ? 64 : 32;
  static constexpr int kColumnTiles = kKeys / 8;
  static constexpr std::size_t kSharedBytes =
      sizeof(BFloat16) * TileElements<kDim>(kRows + 2 * kKeys);
};

template <class Tile>
__global__ void __launch_bounds__(kAttentionThreads)
    ForwardKernel(AttentionForwardArgs<BFloat16> args) {
  constexpr int kDim = Tile::kDim;
  SharedMemory memory;
  const Bf16Tile q = memory.Take<BFloat16>(TileElements<kDim>(Tile::kRows));
  const Bf16Tile k = memory.Take<BFloat16>(TileElements<kDim>(Tile::kKeys));
  const Bf16Tile v = memory.Take<BFloat16>(TileElements<kDim>(Tile::kKeys));

  const int head = static_cast<int>(blockIdx.x) % args.heads;
  const AttentionTile tile =
      args.tiles[static_cast<int>(blockIdx.x) / args.heads];
  const int kv_head = head / args.group();
  const auto keys = args.InQkv(args.qkv, tile, args.KeyPlace(kv_head));
  const auto values = args.InQkv(args.qkv, tile, args.ValuePlace(kv_head));
  const int row = WarpOfBlock() * Tile::kRowsPerWarp;
  const int first_query = tile.begin + row;
  const int last_query = first_query + Tile::kRowsPerWarp - 1;
  const int num_keys = std::min(tile.begin + Tile::kRows, tile.length);
  const float scale_log2 = args.scale * kLog2E;

  LoadTile<kDim, Tile::kRows>(q, args.InQkv(args.qkv, tile, head), tile.begin);
  LoadTile<kDim, Tile::kKeys>(k, keys, 0);
  CommitAsync();

  Softmax<Tile::kRowTiles> softmax;
  Accumulator<Tile::kRowTiles, kDim / 8> out;
  Clear(out);
  for (int first_key = 0; first_key < num_keys; first_key += Tile::kKeys) {
    WaitAsync<0>();
    __syncthreads();
    LoadTile<kDim, Tile::kKeys>(v, values, first_key);
    CommitAsync();
    // Warps of earlier queries have nothing to see in the last tiles.
    const bool sees = first_key <= last_query;
    Accumulator<Tile::kRowTiles, Tile::kColumnTiles> scores;
    if (sees) {
      Clear(scores);
      AddRowProducts<kDim>(q, row, k, scores);
    }
    WaitAsync<0>();
    __syncthreads();
    if (first_key + Tile::kKeys < num_keys) {
      LoadTile<kDim, Tile::kKeys>(k, keys, first_key + Tile::kKeys);
    }
    CommitAsync();
    if (sees) {
      if (first_key + Tile::kKeys - 1 > first_query) {
        SetLaterKeys(first_query, first_key, kMinusInfinity, scores);
      }
      Shrinkage<Tile::kRowTiles> shrinkage;
      softmax.Update(scale_log2, scores, shrinkage);
      Shrink(shrinkage, out);
      LeftSide<Tile::kRowTiles, Tile::kColumnTiles / 2> p;
      Round(scores, p);
      AddProduct<kDim>(p, v, out);
    }
  }

  softmax.Finish(args, tile, head, first_query, out);
  StoreRows<kDim>(out, q, row, tile.begin, args.InOut(args.out, tile, head));
}

cudaError_t ForwardOnTensorCores(const AttentionCall& call,
                                 AttentionForwardArgs<BFloat16> args) {
  return WithPaddedHeadDim(args.head_dim, [&]<int kDim>() {
    using Tile = ForwardTile<kDim>;
    static_assert(Tile::kSharedBytes <= std::size_t{99} << 10);
    TilesOnDevice tiles;
    const cudaError_t error =
        call.Tiles(Tile::kRows, AttentionWork::kKeysBefore, tiles);
    if (error != cudaSuccess) return error;
    args.tiles = tiles.data;
    return Launch(ForwardKernel<Tile>, GridOf(tiles.count, args.heads),
                  dim3(kAttentionThreads), Tile::kSharedBytes, call.stream,
                  args);
  });
}

template <typename T>
cudaError_t Forward(const Kernels::Attention& args, const Tensor& out,
                    const Tensor& lse, bool warpgroups,
                    AttentionTileCache& cache, cudaStream_t stream) {
  const AttentionWorkspace workspace(args.workspace, args.shape.heads,
                                     args.qkv.dim(0));
  const AttentionCall call = {args.layout, workspace, cache, stream};
  AttentionForwardArgs<T> on_device;
  static_cast<AttentionArgs<T>&>(on_device) = ArgsOf<T>(args);
  on_device.out = out.data<T>();
  on_device.lse = lse.data<float>();
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (AttentionOnTensorCores(args.shape, {args.qkv.raw(), out.raw()})) {
      return warpgroups && AttentionOnWarpgroups(args.shape)
                 ? AttentionForwardOnWarpgroups(call, on_device)
                 : ForwardOnTensorCores(call, on_device);
    }
  }
  return PlainAttentionForward(call, on_device);
}

}  // namespace

int64_t CudaKernels::AttentionWorkspaceBytes(const AttentionShape& shape, DType,
                                             int64_t tokens) const {
  return AttentionWorkspace::Bytes(shape.heads, tokens);
}

void CudaKernels::AttentionForward(Stream& stream, const Attention& args,
                                   const Tensor& out, const Tensor& lse) {
  if (!stream.ok() || args.qkv.num_elements() == 0) return;
  CheckAttention(args);
  GW_CHECK(out.dim(0) == args.qkv.dim(0) && lse.dim(0) == args.qkv.dim(0));
  CudaStream& cuda = Cuda(stream);
  cuda.Check(args.qkv.dtype() == DType::kBF16
                 ? Forward<BFloat16>(args, out, lse, warpgroups_,
                                     *attention_tiles_, cuda.get())
                 : Forward<float>(args, out, lse, false, *attention_tiles_,
                                  cuda.get()),
             "attention");
}

}  // namespace gradwire
