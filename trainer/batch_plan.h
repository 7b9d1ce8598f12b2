// SPDX-License-Identifier: Apache-2.0
// Packs the datums of a call into micro-batches, in order and without padding.
#pragma once

#include <cstdint>
#include <vector>

#include "trainer/trainer.h"

namespace gradwire {

// Datums [begin, end) of a call, packed: all have the same number of targets.
struct MicroBatch {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t tokens = 0;
  int64_t k = 1;
};

// Takes datums while they fit `token_budget`; a longer one is alone. Depends on
// nothing but the lengths, so that the same call always packs the same way.
std::vector<MicroBatch> PlanBatch(const std::vector<TrainDatum>& data,
                                  int64_t token_budget);

// The most micro-batches that any of `world` ranks makes of its datums: all of
// them take part in so many.
int64_t MostMicroBatches(const BatchShare& share, int world,
                         int64_t token_budget);

}  // namespace gradwire
