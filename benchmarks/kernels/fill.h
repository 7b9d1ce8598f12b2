// SPDX-License-Identifier: Apache-2.0
// Operands of benchmarks.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "device/tensor.h"

namespace gradwire {

// Normally distributed values, the same in every run. Constants would draw less
// power and so run at higher clocks.
inline void FillNormal(const Tensor& tensor, float deviation) {
  // A pool of values, since drawing one costs more than most ops spend on it.
  static const std::vector<float> pool = [] {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> values(65521);
    for (float& value : values) value = normal(random);
    return values;
  }();
  const int64_t n = tensor.num_elements();
  for (int64_t i = 0; i < n; ++i) {
    const float value = deviation * pool[static_cast<size_t>(i) % pool.size()];
    if (tensor.dtype() == DType::kBF16) {
      tensor.data<BFloat16>()[i] = BFloat16(value);
    } else {
      tensor.data<float>()[i] = value;
    }
  }
}

}  // namespace gradwire
