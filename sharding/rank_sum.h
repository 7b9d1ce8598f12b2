// SPDX-License-Identifier: Apache-2.0
// The one order in which the ranks' numbers are added.
#pragma once

#include <cstdint>
#include <span>

namespace gradwire {

// out = or += ((parts[0] + parts[1]) + parts[2]) + ..., element by element.
//   parts: one array of n elements for each rank; out [n] may be one of them
// REQUIRES: at least one part. Instantiated for float and double.
template <typename T>
void SumInRankOrder(std::span<const T* const> parts, int64_t n, T* out,
                    bool accumulate);

}  // namespace gradwire
