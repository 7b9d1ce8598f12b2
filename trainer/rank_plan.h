// SPDX-License-Identifier: Apache-2.0
// Which rank gets which datums of a call. Pure functions.
#pragma once

#include <cstdint>
#include <vector>

namespace gradwire {

// The rank of each datum, such that all ranks' costs are about the same: a
// sequence of n tokens costs n + quadratic * n^2, with `quadratic` the cost of
// attention between two tokens over that of one token's products. The longest
// first, each to the rank that has least; ties go to the lower index. Depends
// on nothing but its arguments.
std::vector<int> AssignRanks(const std::vector<int64_t>& tokens,
                             double quadratic, int world);

}  // namespace gradwire
