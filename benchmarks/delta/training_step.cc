// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/delta/training_step.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>

#include "checkpoint/delta/value_code.h"

namespace gradwire {
namespace {

constexpr float kBeta1 = 0.9f, kBeta2 = 0.95f, kEpsilon = 1e-8f;

uint16_t RoundToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

TrainedWeights Train(int64_t elements, double learning_rate, int steps) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  // Deviations of moments that have forgotten where they began.
  const float m_deviation = std::sqrt((1 - kBeta1) / (1 + kBeta1));
  const float v_deviation = std::sqrt(2 * (1 - kBeta2) / (1 + kBeta2));
  const float rate = static_cast<float>(learning_rate);
  TrainedWeights weights;
  weights.tensors = {{"weight", "BF16", {elements}}};
  for (int64_t i = 0; i < elements; ++i) {
    float w = 0.02f * normal(random);
    float m = m_deviation * normal(random);
    float v = std::max(0.2f, 1 + v_deviation * normal(random));
    weights.before.push_back(RoundToBf16(w));
    for (int step = 0; step < steps; ++step) {
      const float gradient = normal(random);
      m = kBeta1 * m + (1 - kBeta1) * gradient;
      v = kBeta2 * v + (1 - kBeta2) * gradient * gradient;
      w -= rate * m / (std::sqrt(v) + kEpsilon);
    }
    weights.after.push_back(RoundToBf16(w));
  }
  return weights;
}

double EntropyBound(const TrainedWeights& weights) {
  std::vector<int64_t> counts(1 << 16);
  for (size_t i = 0; i < weights.before.size(); ++i) {
    ++counts[EncodeChange(weights.before[i], weights.after[i])];
  }
  const double n = static_cast<double>(weights.before.size());
  double bits = 0;
  for (const int64_t count : counts) {
    if (count == 0) continue;
    const double share = static_cast<double>(count) / n;
    bits -= share * std::log2(share);
  }
  return 16 / bits;
}

}  // namespace gradwire
