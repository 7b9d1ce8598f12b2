// SPDX-License-Identifier: Apache-2.0
#include "trainer/batch_plan.h"

namespace gradwire {

std::vector<MicroBatch> PlanBatch(const std::vector<TrainDatum>& data,
                                  int64_t token_budget) {
  std::vector<MicroBatch> plan;
  for (int64_t i = 0; i < static_cast<int64_t>(data.size()); ++i) {
    const int64_t tokens = static_cast<int64_t>(data[i].tokens.size());
    if (plan.empty() || plan.back().k != data[i].k ||
        plan.back().tokens + tokens > token_budget) {
      plan.push_back({i, i, 0, data[i].k});
    }
    plan.back().end = i + 1;
    plan.back().tokens += tokens;
  }
  return plan;
}

}  // namespace gradwire
