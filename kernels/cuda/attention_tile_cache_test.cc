// SPDX-License-Identifier: Apache-2.0
// Lists of tiles are kept where that is right, and are right where they are
// not.
#include "kernels/cuda/attention_tile_cache.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace gradwire {
namespace {

using CuSeqlens = std::vector<int32_t>;

class AttentionTileCacheTest : public testing::Test {
 protected:
  AttentionTileCacheTest() {
    EXPECT_EQ(cudaMalloc(&memory_, AttentionTileCache::kBytes), cudaSuccess);
    EXPECT_EQ(cudaMalloc(&room_, kRoomBytes), cudaSuccess);
    for (cudaStream_t& stream : streams_) {
      EXPECT_EQ(cudaStreamCreateWithFlags(&stream, 0), cudaSuccess);
    }
  }
  ~AttentionTileCacheTest() override {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    cudaFree(room_);
    cudaFree(memory_);
  }

  AttentionTile* room() const { return static_cast<AttentionTile*>(room_); }

  // Asks for tiles, and looks at them.
  const AttentionTile* Get(const CuSeqlens& cu_seqlens, int rows,
                           AttentionWork work, int stream = 0) {
    const SequenceLayout layout = {cu_seqlens.data(),
                                   static_cast<int64_t>(cu_seqlens.size()) - 1};
    TilesOnDevice tiles;
    EXPECT_EQ(cache().Get(layout, rows, work, room(), streams_[stream], tiles),
              cudaSuccess);
    cudaStreamSynchronize(streams_[stream]);
    const std::vector<AttentionTile> want = AttentionTiles(layout, rows, work);
    std::vector<AttentionTile> got(want.size());
    EXPECT_EQ(tiles.count, static_cast<int64_t>(want.size()));
    cudaMemcpyAsync(got.data(), tiles.data, got.size() * sizeof(AttentionTile),
                    cudaMemcpyDeviceToHost, streams_[stream]);
    cudaStreamSynchronize(streams_[stream]);
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_EQ(got[i].first, want[i].first) << i;
      EXPECT_EQ(got[i].length, want[i].length) << i;
      EXPECT_EQ(got[i].begin, want[i].begin) << i;
    }
    return tiles.data;
  }

  AttentionTileCache& cache() {
    if (!cache_) cache_ = std::make_unique<AttentionTileCache>(memory_);
    return *cache_;
  }

 private:
  static constexpr size_t kRoomBytes = 1 << 20;

  void* memory_ = nullptr;
  void* room_ = nullptr;
  cudaStream_t streams_[2] = {};
  std::unique_ptr<AttentionTileCache> cache_;
};

constexpr auto kBefore = AttentionWork::kKeysBefore;
constexpr auto kAfter = AttentionWork::kQueriesAfter;

TEST_F(AttentionTileCacheTest, LayersShareTheirLists) {
  const CuSeqlens sequences = {0, 5, 200, 330};
  const AttentionTile* const before = Get(sequences, 128, kBefore);
  const AttentionTile* const after = Get(sequences, 128, kAfter);
  EXPECT_NE(before, after);
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(Get(sequences, 128, kBefore), before);
    EXPECT_EQ(Get(sequences, 128, kAfter), after);
  }
  EXPECT_NE(before, room());
}

TEST_F(AttentionTileCacheTest, WhatDiffersIsAnotherList) {
  const AttentionTile* const first = Get({0, 5, 200}, 128, kBefore);
  EXPECT_NE(Get({0, 5, 200}, 64, kBefore), first);
  EXPECT_NE(Get({0, 6, 200}, 128, kBefore), first);
  EXPECT_NE(Get({0, 5, 200, 201}, 128, kBefore), first);
  // Only so many are kept; those that are not are sent again.
  Get({0, 9}, 128, kBefore);
  Get({0, 5, 200}, 128, kBefore);
  Get({0, 5, 200}, 64, kBefore);
}

TEST_F(AttentionTileCacheTest, AnotherStreamUsesItsOwnRoom) {
  Get({0, 300}, 128, kBefore);
  EXPECT_EQ(Get({0, 300}, 128, kBefore, 1), room());
  EXPECT_NE(Get({0, 300}, 128, kBefore), room());
}

TEST_F(AttentionTileCacheTest, ALongListIsNotKept) {
  CuSeqlens sequences(AttentionTileCache::kMaxTiles + 2);
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i] = static_cast<int32_t>(i);
  }
  EXPECT_EQ(Get(sequences, 128, kBefore), room());
  sequences.pop_back();
  EXPECT_NE(Get(sequences, 128, kBefore), room());
}

}  // namespace
}  // namespace gradwire
