// SPDX-License-Identifier: Apache-2.0
#include "trainer/rank_plan.h"

#include <algorithm>
#include <cstddef>
#include <numeric>

#include "base/check.h"

namespace gradwire {

std::vector<int> AssignRanks(const std::vector<int64_t>& tokens,
                             double quadratic, int world) {
  GW_CHECK(world >= 1 && quadratic >= 0);
  std::vector<int> rank_of(tokens.size(), 0);
  if (world == 1) return rank_of;
  std::vector<size_t> order(tokens.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return tokens[a] > tokens[b]; });
  std::vector<double> load(static_cast<size_t>(world), 0.0);
  for (const size_t i : order) {
    const auto least = std::min_element(load.begin(), load.end());
    const double n = static_cast<double>(tokens[i]);
    *least += n + quadratic * n * n;
    rank_of[i] = static_cast<int>(least - load.begin());
  }
  return rank_of;
}

double QuadraticCost(const ModelConfig& config, int64_t num_parameters) {
  // A tied embedding is counted once, as the head.
  const int64_t in_products =
      num_parameters -
      (config.tied_embeddings ? 0 : config.vocab * config.hidden);
  return static_cast<double>(config.layers * config.AttentionWidth()) /
         static_cast<double>(std::max<int64_t>(1, in_products));
}

}  // namespace gradwire
