// SPDX-License-Identifier: Apache-2.0
// How attention's work is cut: a block owns a tile, some rows of one sequence,
// for one head. The host lists the tiles, those with most work first, so that
// the short ones fill the gaps at the end. All layers of a micro-batch ask for
// the same few lists, which are sent once.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "device/cuda/launch_record.h"
#include "kernels/kernels.h"

namespace gradwire {

struct AttentionTile {
  int32_t first;   // token that the sequence begins with
  int32_t length;  // of the sequence
  int32_t begin;   // first row of the tile, counted from `first`
};

// What a tile's block goes through.
enum class AttentionWork { kKeysBefore, kQueriesAfter };

inline std::vector<AttentionTile> AttentionTiles(const SequenceLayout& layout,
                                                 int rows, AttentionWork work) {
  std::vector<AttentionTile> tiles;
  for (int64_t s = 0; s < layout.num_sequences; ++s) {
    const int32_t first = layout.cu_seqlens[s];
    const int32_t length = layout.cu_seqlens[s + 1] - first;
    for (int32_t begin = 0; begin < length; begin += rows) {
      tiles.push_back({first, length, begin});
    }
  }
  const auto cost = [&](const AttentionTile& tile) {
    return work == AttentionWork::kKeysBefore
               ? std::min(tile.begin + rows, tile.length)
               : tile.length - tile.begin;
  };
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&](const AttentionTile& a, const AttentionTile& b) {
                     return cost(a) > cost(b);
                   });
  return tiles;
}

struct TilesOnDevice {
  const AttentionTile* data = nullptr;
  int64_t count = 0;
};

class AttentionTileCache {
 public:
  // One of each work for a micro-batch, and two numbers of rows on some GPUs:
  // of the few micro-batches of a step each finds its lists where they were.
  static constexpr int kLists = 16;
  // A longer list is sent for each call.
  static constexpr int64_t kMaxTiles = 1 << 14;
  static constexpr int64_t kBytes =
      kLists * kMaxTiles * static_cast<int64_t>(sizeof(AttentionTile));

  // `memory` is of the device and of kBytes.
  explicit AttentionTileCache(void* memory)
      : memory_(static_cast<AttentionTile*>(memory)) {}

  // The tiles for work that is queued on `stream` next. Those that are not kept
  // go to `room`: what is kept is written in the order of one stream, which is
  // the first that asks.
  cudaError_t Get(const SequenceLayout& layout, int rows, AttentionWork work,
                  AttentionTile* room, cudaStream_t stream,
                  TilesOnDevice& out) {
    const int32_t* const begin = layout.cu_seqlens;
    const int32_t* const end = begin + layout.num_sequences + 1;
    if (!owned_) {
      owned_ = true;
      owner_ = stream;
    }
    if (stream == owner_) {
      for (const List& list : lists_) {
        if (list.rows == rows && list.work == work &&
            std::equal(begin, end, list.cu_seqlens.begin(),
                       list.cu_seqlens.end())) {
          out = list.tiles;
          return cudaSuccess;
        }
      }
    }
    const std::vector<AttentionTile> tiles = AttentionTiles(layout, rows, work);
    const auto count = static_cast<int64_t>(tiles.size());
    if (stream != owner_ || count > kMaxTiles) {
      out = {room, count};
      return Send(tiles, room, stream);
    }
    const int place = next_;
    next_ = (next_ + 1) % kLists;
    AttentionTile* const to = memory_ + place * kMaxTiles;
    List& list = lists_[place];
    list = List();
    const cudaError_t error = Send(tiles, to, stream);
    if (error != cudaSuccess) return error;
    out = {to, count};
    list = {rows, work, {begin, end}, out};
    return cudaSuccess;
  }

 private:
  struct List {
    int rows = 0;  // 0: nothing
    AttentionWork work = AttentionWork::kKeysBefore;
    std::vector<int32_t> cu_seqlens;
    TilesOnDevice tiles;
  };

  // CUDA has taken the tiles, which are pageable memory, when this returns.
  static cudaError_t Send(const std::vector<AttentionTile>& tiles,
                          AttentionTile* to, cudaStream_t stream) {
    return QueueCopyFromHost(
        to, tiles.data(),
        static_cast<int64_t>(tiles.size() * sizeof(AttentionTile)), stream);
  }

  AttentionTile* const memory_;
  bool owned_ = false;
  cudaStream_t owner_ = nullptr;
  List lists_[kLists];
  int next_ = 0;
};

}  // namespace gradwire
