// SPDX-License-Identifier: Apache-2.0
// sharding/rank_sum.h on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gradwire {

// One array of n elements for each rank: this rank's own, and those of the
// others, in rank order, `stride` elements apart.
template <typename T>
struct RankParts {
  const T* own;
  const T* others;
  int64_t stride;
  int rank;
  int world;
};

// out = or += the parts, added in rank order, element by element. All on the
// device; out [n] may be `own`, and overlaps nothing else.
// Instantiated for float and double.
template <typename T>
cudaError_t SumInRankOrder(const RankParts<T>& parts, int64_t n, T* out,
                           bool accumulate, cudaStream_t stream);

}  // namespace gradwire
