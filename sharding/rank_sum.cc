// SPDX-License-Identifier: Apache-2.0
#include "sharding/rank_sum.h"

#include <algorithm>
#include <cstdint>
#include <span>

namespace gradwire {
namespace {

// Elements whose sum stays in the innermost cache while parts are added.
constexpr int64_t kBlock = 1024;

template <typename T>
void Copy(const T* __restrict from, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

template <typename T>
void Add(const T* __restrict from, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

}  // namespace

template <typename T>
void SumInRankOrder(std::span<const T* const> parts, int64_t n, T* out,
                    bool accumulate) {
  T sum[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    Copy(parts[0] + begin, size, sum);
    for (const T* part : parts.subspan(1)) Add(part + begin, size, sum);
    if (accumulate) {
      Add(sum, size, out + begin);
    } else {
      Copy(sum, size, out + begin);
    }
  }
}

template void SumInRankOrder<float>(std::span<const float* const>, int64_t,
                                    float*, bool);
template void SumInRankOrder<double>(std::span<const double* const>, int64_t,
                                     double*, bool);

}  // namespace gradwire
