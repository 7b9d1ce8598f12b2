// SPDX-License-Identifier: Apache-2.0
// The digest of kernels/state_digest.h, of what a warp has in registers. A lane
// always has the same places of a block, hence the same keys, which stay in
// registers, too.
#pragma once

#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/reduce.h"
#include "kernels/state_digest.h"

namespace gradwire {

// Elements of a lane that lie side by side: 16 bytes of float32, and 8 of
// bfloat16, so that a warp's access is whole sectors of either.
inline constexpr int kLaneElements = 4;
// Of a warp at once: element (g, j) of a lane is number
// g * kGroupElements + lane * kLaneElements + j of the tile.
inline constexpr int kGroupElements = kWarpSize * kLaneElements;
inline constexpr int kGroups = 2;
inline constexpr int kTileElements = kGroups * kGroupElements;

// In memory, whence every thread fetches its own: constant memory would serve
// one address after the other.
static __device__ const DigestKeys kDeviceDigestKeys = kDigestKeys;

class WarpDigest {
 public:
  __device__ WarpDigest() {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int j = 0; j < kLaneElements; ++j) {
        keys_[s][j] =
            kDeviceDigestKeys.key[s][Lane() % kBlockLanes * kLaneElements + j];
      }
    }
  }

  // `bits` is what is stored of element (group, j): master, m, v.
  __device__ void Add(int group, int j, const uint32_t (&bits)[3]) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      sums_[group][0] += uint64_t{keys_[s][j]} * bits[s];
      sums_[group][1] += uint64_t{keys_[s][j ^ 1]} * bits[s];
    }
  }

  // Ends a tile, whose first block is `block` and of which `blocks` are there.
  // The four sums of a half-warp (group, lane of the digest) end up in four of
  // its lanes, each of which has three like it.
  __device__ void EndTile(int64_t block, int64_t blocks) {
    const bool second_group = (Lane() & 8) != 0, second_sum = (Lane() & 4) != 0;
    uint64_t own[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t kept = second_group ? sums_[1][i] : sums_[0][i];
      const uint64_t given = second_group ? sums_[0][i] : sums_[1][i];
      own[i] = kept + __shfl_xor_sync(kAllLanes, given, 8);
      sums_[0][i] = sums_[1][i] = 0;
    }
    uint64_t sum = second_sum ? own[1] : own[0];
    sum += __shfl_xor_sync(kAllLanes, second_sum ? own[0] : own[1], 4);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    const int place = (second_group ? 2 : 0) + Lane() / kBlockLanes;
    if (place >= blocks) return;
    total_ += DigestMix(DigestMix(static_cast<uint64_t>(block + place)) + sum);
  }

  // digest [2] += what the warps of this block have. `shared` has two elements
  // for each warp.
  __device__ void AddTo(unsigned long long* digest,
                        SharedArray<uint64_t> shared) const {
    uint64_t sum = total_;
    sum += __shfl_xor_sync(kAllLanes, sum, 8);
    sum += __shfl_xor_sync(kAllLanes, sum, 16);
    const auto thread = static_cast<int>(threadIdx.x);
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    if (Lane() == 0) shared[thread / kWarpSize] = sum;
    if (Lane() == 4) shared[warps + thread / kWarpSize] = sum;
    __syncthreads();
    if (thread >= 2) return;
    sum = 0;
    for (int i = 0; i < warps; ++i) sum += shared[thread * warps + i];
    atomicAdd(digest + thread, static_cast<unsigned long long>(sum));
  }

 private:
  static constexpr int kBlockLanes = kDigestBlock / kLaneElements;
  static_assert(kBlockLanes == 16 && kGroups == 2, "as EndTile has it");

  __device__ static int Lane() {
    return static_cast<int>(threadIdx.x) % kWarpSize;
  }

  uint32_t keys_[3][kLaneElements];
  uint64_t sums_[kGroups][2] = {};  // of this tile
  uint64_t total_ = 0;
};

}  // namespace gradwire
