// SPDX-License-Identifier: Apache-2.0
// The two passes of attention's gradient on tensor cores. In both a block owns
// a pair of tiles, one row of each per row of what it writes, and streams pairs
// of tiles through two buffers: while one pair is used the next comes in.
//   d_q        owns q and d_out, streams k and v of the keys before its queries
//   d_k, d_v   owns k and v, streams q and d_out of the queries after its keys
// Rows of the own tiles times rows of the streamed ones give scores and d_p of
// a warp's rows in registers.
#pragma once

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_tiles.h"

namespace gradwire {

// args.stats are there.
cudaError_t AttentionQueryGradient(const AttentionCall& call,
                                   AttentionGradArgs<BFloat16> args);
cudaError_t AttentionKeyGradient(const AttentionCall& call,
                                 AttentionGradArgs<BFloat16> args);

template <int kDim_, int kRowTiles_, int kStreamed_>
struct GradientTile {
  static constexpr int kDim = kDim_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRowsPerWarp = 16 * kRowTiles;
  static constexpr int kRows = kAttentionWarps * kRowsPerWarp;
  // Rows of a streamed tile.
  static constexpr int kStreamed = kStreamed_;
  static constexpr int kColumnTiles = kStreamed / 8;
  static constexpr std::size_t kSharedBytes =
      sizeof(BFloat16) * 2 * TileElements<kDim>(kRows + 2 * kStreamed);
  static_assert(kSharedBytes <= std::size_t{99} << 10);
};

// The tiles of a block.
template <class Tile>
struct GradientTiles {
  static constexpr int kOwn = TileElements<Tile::kDim>(Tile::kRows);
  static constexpr int kStreamed = TileElements<Tile::kDim>(Tile::kStreamed);

  __device__ explicit GradientTiles(SharedMemory& memory)
      : own{memory.Take<BFloat16>(kOwn), memory.Take<BFloat16>(kOwn)},
        streamed{memory.Take<BFloat16>(2 * kStreamed),
                 memory.Take<BFloat16>(2 * kStreamed)} {}

  __device__ Bf16Tile Streamed(int which, int step) const {
    return streamed[which].Slice(step % 2 * kStreamed, kStreamed);
  }

  Bf16Tile own[2];
  Bf16Tile streamed[2];
};

}  // namespace gradwire
