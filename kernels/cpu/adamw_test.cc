// SPDX-License-Identifier: Apache-2.0
// Moments in bfloat16 learn what moments in float32 learn.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/kernels.h"

namespace gradwire {
namespace {

constexpr int64_t kCoordinates = 1024;
constexpr int64_t kNoisySteps = 1000, kSteps = 5000;

enum class Moments { kF32, kStochastic, kNearest };

// The mean over the coordinates, and how far chance may take it: six standard
// deviations of a mean of so many independent values.
struct Mean {
  double value = 0, spread = 0;
};

template <class Values>
Mean MeanOf(const Values& values) {
  double sum = 0, squares = 0;
  for (const double x : values) {
    sum += x;
    squares += x * x;
  }
  const double n = static_cast<double>(values.size());
  const double mean = sum / n;
  return {mean, 6 * std::sqrt((squares / n - mean * mean) / n)};
}

struct Outcome {
  Mean loss;  // the squared distance from the optimum
  Mean v;
};

// Minimises (w - 1)^2 / 200 in every coordinate, from 0, along gradients whose
// noise is strong at first and then weak, as it is when a batch becomes easy or
// grows: v must fall, and steps must grow. The noise is the same whatever the
// moments are.
Outcome Minimise(Moments moments) {
  CpuDevice device(1);
  const auto stream = device.NewStream();
  const auto kernels = NewCpuKernels();
  std::mt19937 random(5);
  std::normal_distribution<float> noise;
  std::vector<float> w(kCoordinates), grad(kCoordinates);
  std::vector<float> m(kCoordinates), v(kCoordinates);
  std::vector<BFloat16> short_m(kCoordinates), short_v(kCoordinates);
  const auto tensor = [](auto& of) {
    return Tensor(of.data(), DTypeOf<std::decay_t<decltype(of[0])>>::value,
                  {kCoordinates});
  };
  const bool is_short = moments == Moments::kStochastic;
  AdamWParams params;
  params.learning_rate = 1e-3f;
  params.beta1 = 0.9f;
  params.beta2 = 0.999f;
  params.eps = 1e-8f;
  for (params.step = 1; params.step <= kSteps; ++params.step) {
    const float strength = params.step <= kNoisySteps ? 1.0f : 0.01f;
    for (size_t i = 0; i < w.size(); ++i) {
      grad[i] = (w[i] - 1) / 100 + strength * noise(random);
    }
    kernels->AdamW(*stream, params,
                   {tensor(w), Tensor(), is_short ? tensor(short_m) : tensor(m),
                    is_short ? tensor(short_v) : tensor(v), tensor(grad)});
    if (moments != Moments::kNearest) continue;
    for (float& x : m) x = static_cast<float>(BFloat16(x));
    for (float& x : v) x = static_cast<float>(BFloat16(x));
  }
  EXPECT_TRUE(stream->Finish().ok());
  std::vector<double> losses, vs;
  for (size_t i = 0; i < w.size(); ++i) {
    losses.push_back((w[i] - 1) * (w[i] - 1));
    vs.push_back(is_short ? static_cast<float>(short_v[i]) : v[i]);
  }
  return {MeanOf(losses), MeanOf(vs)};
}

TEST(AdamWTest, StochasticMomentsLearnAndNearestOnesFreeze) {
  const Outcome whole = Minimise(Moments::kF32);
  const Outcome stochastic = Minimise(Moments::kStochastic);
  const Outcome nearest = Minimise(Moments::kNearest);
  const auto differ = [](const Mean& a, const Mean& b) {
    return std::abs(a.value - b.value) > a.spread + b.spread;
  };
  EXPECT_LT(whole.loss.value + whole.loss.spread, 1) << "1 at the start";
  EXPECT_FALSE(differ(stochastic.v, whole.v))
      << stochastic.v.value << " and " << whole.v.value;
  EXPECT_FALSE(differ(stochastic.loss, whole.loss))
      << stochastic.loss.value << " and " << whole.loss.value;
  // A thousandth of v is less than half a unit in its last place: v does not
  // fall, steps stay small, and the loss high.
  EXPECT_GT(nearest.v.value - nearest.v.spread, whole.v.value + whole.v.spread);
  EXPECT_GT(nearest.loss.value - nearest.loss.spread,
            whole.loss.value + whole.loss.spread);
}

}  // namespace
}  // namespace gradwire
