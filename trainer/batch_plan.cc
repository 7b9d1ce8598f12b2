// SPDX-License-Identifier: Apache-2.0
#include "trainer/batch_plan.h"

#include <algorithm>

namespace gradwire {
namespace {

void AddDatum(int64_t index, int64_t tokens, int64_t k, int64_t token_budget,
              std::vector<MicroBatch>& plan) {
  if (plan.empty() || plan.back().k != k ||
      plan.back().tokens + tokens > token_budget) {
    plan.push_back({index, index, 0, k});
  }
  plan.back().end = index + 1;
  plan.back().tokens += tokens;
}

}  // namespace

std::vector<MicroBatch> PlanBatch(const std::vector<TrainDatum>& data,
                                  int64_t token_budget) {
  std::vector<MicroBatch> plan;
  for (int64_t i = 0; i < static_cast<int64_t>(data.size()); ++i) {
    AddDatum(i, static_cast<int64_t>(data[i].tokens.size()), data[i].k,
             token_budget, plan);
  }
  return plan;
}

int64_t MostMicroBatches(const BatchShare& share, int world,
                         int64_t token_budget) {
  std::vector<std::vector<MicroBatch>> plans(static_cast<size_t>(world));
  for (size_t i = 0; i < share.tokens.size(); ++i) {
    AddDatum(static_cast<int64_t>(i), share.tokens[i], share.k[i], token_budget,
             plans[static_cast<size_t>(share.rank_of[i])]);
  }
  int64_t most = 0;
  for (const auto& plan : plans) {
    most = std::max(most, static_cast<int64_t>(plan.size()));
  }
  return most;
}

}  // namespace gradwire
