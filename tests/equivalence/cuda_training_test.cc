// SPDX-License-Identifier: Apache-2.0
// A training on a GPU, or on the emulator, whichever is linked: its loss curve
// is that of a CPU as near as roundings allow, and the same bits in every run.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "device/cpu_device.h"
#include "device/cuda/graph_cache.h"
#include "device/cuda/test_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/cuda_kernels.h"
#include "model/param_table.h"
#include "tests/equivalence/sharded_job.h"
#include "trainer/trainer.h"

namespace gradwire {
namespace {

constexpr int kSteps = 5;

struct Curve {
  std::vector<double> losses;  // before each step
  std::vector<double> norms;
  std::vector<std::string> digests;
  Values logprobs;  // after the last one
  Values weights;
  int64_t vocab = 0;
};

// Half of the steps are custom ones.
Curve Train(const TrainerOptions& options, Device& device, Kernels& kernels) {
  Curve curve;
  auto made = Trainer::Create(
      options, device, kernels, [](const MemoryPlan&) {}, [](double) {});
  EXPECT_TRUE(made.ok()) << made.status();
  if (!made.ok()) return curve;
  Trainer& trainer = **made;
  curve.vocab = trainer.config().vocab;
  const auto data = Batch(trainer.config().vocab, 1, kLengths);
  const auto forward = [&](const ForwardOptions& with) {
    Values logprobs(data.size());
    auto outcome = trainer.Forward(data, with, [&](DatumLogprobs done) {
      logprobs[static_cast<size_t>(done.index)] = std::move(done.logprobs);
    });
    EXPECT_TRUE(outcome.ok()) << outcome.status();
    return logprobs;
  };
  for (int step = 0; step < kSteps; ++step) {
    const bool custom = step % 2 == 1;
    const Values logprobs = forward(custom ? Retain("a") : WithBackward());
    if (custom) {
      auto outcome = trainer.Backward("a", Negated(data), false);
      EXPECT_TRUE(outcome.ok()) << outcome.status();
    }
    double loss = 0;
    for (size_t i = 0; i < data.size(); ++i) {
      for (size_t t = 0; t < data[i].weights.size(); ++t) {
        loss -= double{data[i].weights[t]} * logprobs[i][t];
      }
    }
    curve.losses.push_back(loss);
    OptimParams params;
    params.learning_rate = 0.2;
    params.grad_clip_norm = 0.5;
    // As long as the gradient is large: no element's step is its gradient's
    // sign, which noise could turn.
    params.eps = 1.0;
    auto stepped = trainer.OptimStep(params);
    EXPECT_TRUE(stepped.ok()) << stepped.status();
    curve.norms.push_back(stepped.ok() ? stepped->grad_norm : 0);
    auto digest = trainer.StateDigest();
    EXPECT_TRUE(digest.ok()) << digest.status();
    curve.digests.push_back(digest.ok() ? *digest : "");
  }
  curve.logprobs = forward({});
  const ParamTable table(trainer.config());
  for (const ParamRow& row : table.rows()) {
    auto weight = trainer.Weight(row.hf_name);
    EXPECT_TRUE(weight.ok()) << weight.status();
    if (weight.ok()) curve.weights.push_back(*std::move(weight));
  }
  return curve;
}

class CudaTrainingTest
    : public testing::TestWithParam<std::tuple<std::string, Precision>> {};

TEST_P(CudaTrainingTest, IsTheSameInEveryRunAndThatOfACpu) {
  const auto [model, precision] = GetParam();
  TrainerOptions options;
  options.model_directory = Directory(model);
  options.precision = precision;
  options.micro_batch_tokens = 48;
  options.max_context = 32;
  options.activation_bytes = 16 << 20;
  std::vector<Curve> runs;
  for (int i = 0; i < 3; ++i) {
    // The last one with blocks as graphs.
    const int64_t replayed = GraphCache::NumReplayed();
    if (i == 2) setenv("GRADWIRE_CUDA_GRAPHS", "1", 1);
    // A device and kernels of its own, as another process would have.
    const auto device = MakeTestDevice();
    if (device == nullptr) GTEST_SKIP();
    auto kernels = NewCudaKernels(*device);
    ASSERT_TRUE(kernels.ok()) << kernels.status();
    runs.push_back(Train(options, *device, **kernels));
    unsetenv("GRADWIRE_CUDA_GRAPHS");
    if (i == 2) {
      EXPECT_GT(GraphCache::NumReplayed(), replayed);
    } else {
      EXPECT_EQ(GraphCache::NumReplayed(), replayed);
    }
  }
  for (const Curve& curve : {runs[1], runs[2]}) {
    EXPECT_EQ(curve.losses, runs[0].losses);
    EXPECT_EQ(curve.norms, runs[0].norms);
    EXPECT_EQ(curve.digests, runs[0].digests);
    EXPECT_EQ(curve.logprobs, runs[0].logprobs);
    EXPECT_EQ(curve.weights, runs[0].weights);
  }

  CpuDevice cpu(1);
  const auto kernels = NewCpuKernels();
  const Curve want = Train(options, cpu, *kernels);
  // A logprob is of some dozen results a block, each rounded on its own way (in
  // float32 once for each of up to 48 terms): they add like a random walk, and
  // so do the logprobs in a loss, and the steps in a weight.
  const bool f32 = precision == Precision::kF32;
  const double layers = 5;
  const double sigma = std::ldexp(1.0, f32 ? -24 : -8) *
                       std::sqrt(2 * 12 * (layers + 1) * (f32 ? 48 : 1));
  double squares = 0;
  for (const auto& datum : Batch(want.vocab, 1, kLengths)) {
    for (const float weight : datum.weights) {
      squares += double{weight} * weight;
    }
  }
  const Curve& got = runs[0];
  for (size_t step = 0; step < kSteps; ++step) {
    const double steps = std::sqrt(static_cast<double>(step + 1));
    EXPECT_NEAR(got.losses[step], want.losses[step],
                sigma * std::sqrt(squares) * steps)
        << step;
    EXPECT_NEAR(got.norms[step], want.norms[step],
                sigma * steps * want.norms[step])
        << step;
  }
  // And it has learned: far more than that.
  EXPECT_LT(got.losses.back(),
            got.losses.front() - 20 * sigma * std::sqrt(squares));
}

// Some of which begin alike, and are computed once; of some layers only the
// inputs are kept.
std::vector<std::string> DigestsOfRecomputed(bool graphs) {
  TrainerOptions options;
  options.model_directory = Directory("tied");
  options.precision = Precision::kBF16;
  options.micro_batch_tokens = 64;
  options.max_context = 32;
  options.activation_bytes = 1;
  std::vector<std::string> digests;
  if (graphs) setenv("GRADWIRE_CUDA_GRAPHS", "1", 1);
  const auto device = MakeTestDevice();
  if (device == nullptr) return digests;
  auto kernels = NewCudaKernels(*device);
  EXPECT_TRUE(kernels.ok()) << kernels.status();
  auto made = Trainer::Create(
      options, *device, **kernels, [](const MemoryPlan&) {}, [](double) {});
  unsetenv("GRADWIRE_CUDA_GRAPHS");
  EXPECT_TRUE(made.ok()) << made.status();
  Trainer& trainer = **made;
  auto data = Batch(trainer.config().vocab, 3, {13, 7, 9});
  for (size_t i = 1; i < data.size(); ++i) {
    std::copy_n(data[0].tokens.begin(), 6, data[i].tokens.begin());
  }
  for (int step = 0; step < 4; ++step) {
    auto forward = trainer.Forward(data, Retain("a"), [](DatumLogprobs) {});
    EXPECT_TRUE(forward.ok()) << forward.status();
    auto backward = trainer.Backward("a", Negated(data), false);
    EXPECT_TRUE(backward.ok() && backward->recomputed) << backward.status();
    EXPECT_TRUE(trainer.OptimStep({}).ok());
    auto digest = trainer.StateDigest();
    EXPECT_TRUE(digest.ok()) << digest.status();
    digests.push_back(digest.ok() ? *digest : "");
  }
  return digests;
}

TEST(CudaGraphsTest, RecomputedLayersAndSharedRowsHaveTheSameBits) {
  const auto want = DigestsOfRecomputed(false);
  if (want.empty()) GTEST_SKIP();
  const int64_t before = GraphCache::NumReplayed();
  EXPECT_EQ(DigestsOfRecomputed(true), want);
  // Four layers, of which the first of a micro-batch sends its tiles: forward
  // and backward of the third and the fourth step.
  EXPECT_GE(GraphCache::NumReplayed() - before, 2 * 2 * 3);
}

INSTANTIATE_TEST_SUITE_P(
    All, CudaTrainingTest,
    testing::Combine(testing::Values("untied", "tied"),
                     testing::Values(Precision::kF32, Precision::kBF16)),
    [](const testing::TestParamInfo<std::tuple<std::string, Precision>>& info) {
      return std::get<0>(info.param) +
             (std::get<1>(info.param) == Precision::kF32 ? "F32" : "BF16");
    });

}  // namespace
}  // namespace gradwire
