// SPDX-License-Identifier: Apache-2.0
// bf16 weights before and after Adam has made a few steps.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoint/delta/tensor_hash.h"

namespace gradwire {

struct TrainedWeights {
  std::vector<TensorInfo> tensors;      // bf16, one after the other
  std::vector<uint16_t> before, after;  // [their elements]
};

// Weights are normal with deviation 0.02, gradients normal noise, so that the
// moments are those of a run that has gone on for long; beta = (0.9, 0.95), no
// decay. The masters are float32, rounded to bf16 before the first step and
// after the last.
TrainedWeights Train(int64_t elements, double learning_rate, int steps);

// What no code can do better than if elements change independently of each
// other: 16 bits over the entropy of whether one changes, and by how much.
double EntropyBound(const TrainedWeights& weights);

}  // namespace gradwire
