// SPDX-License-Identifier: Apache-2.0
// Which rank gets which datums of a call. Pure functions.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"

namespace gradwire {

// The rank of each datum, such that all ranks' costs are about the same: a
// sequence of n tokens costs n + quadratic * n^2, with `quadratic` the cost of
// attention between two tokens over that of one token's products. The longest
// first, each to the rank that has least; ties go to the lower index. Depends
// on nothing but its arguments.
std::vector<int> AssignRanks(const std::vector<int64_t>& tokens,
                             double quadratic, int world);

// `quadratic` of a model. Of forward and backward together, with a causal mask
// and A = heads * head_dim, a sequence of n tokens costs
//   products    6 P n             P: parameters that take part in products, so
//                                 not the embedding but the head
//   attention   6 layers A n^2    2 products of [n, A] with [A, n] or [n, n]
//                                 forward and 4 backward, half of each masked
// operations, whose ratio is n + (layers A / P) n^2.
double QuadraticCost(const ModelConfig& config, int64_t num_parameters);

}  // namespace gradwire
