// SPDX-License-Identifier: Apache-2.0
// Ways to the same result give the same bits: retained, recomputed, evicted,
// fused and two-call gradients; forward alone or with a backward; one call or
// several. And what a trainer refuses.
#include "trainer/trainer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "device/arena.h"
#include "device/cpu_device.h"
#include "device/prefault.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/optimizer_state.h"
#include "model/param_table.h"

namespace gradwire {
namespace {

constexpr char kData[] = "tests/golden/data/";

struct Rig {
  std::unique_ptr<CpuDevice> device = std::make_unique<CpuDevice>(2);
  std::unique_ptr<Kernels> kernels = NewCpuKernels();
  std::unique_ptr<Trainer> trainer;
};

Rig Make(const std::string& model, TrainerOptions options) {
  Rig rig;
  options.model_directory = kData + model;
  auto trainer = Trainer::Create(
      options, *rig.device, *rig.kernels, [](const MemoryPlan&) {},
      [](double) {});
  EXPECT_TRUE(trainer.ok()) << trainer.status();
  if (trainer.ok()) rig.trainer = *std::move(trainer);
  return rig;
}

std::string Reason(const absl::Status& status) {
  auto detail = GetErrorDetail(status);
  return detail ? detail->reason : std::string(status.message());
}

// Odd lengths from 1 up, some weights 0 and some negative.
std::vector<TrainDatum> Batch(int64_t vocab, uint32_t seed = 1) {
  std::vector<TrainDatum> data;
  uint32_t state = seed;
  const auto next = [&] {
    return (state = state * 1664525u + 1013904223u) >> 8;
  };
  for (int64_t n : {7, 1, 13, 4, 31, 2}) {
    TrainDatum datum;
    for (int64_t i = 0; i < n; ++i) {
      datum.tokens.push_back(static_cast<int32_t>(next() % vocab));
      datum.targets.push_back(static_cast<int32_t>(next() % vocab));
      datum.weights.push_back(
          next() % 4 == 0 ? 0.0f : static_cast<float>(next() % 200) / 64 - 1);
    }
    data.push_back(datum);
  }
  return data;
}

// d(loss)/d(logprob) of a weighted cross entropy.
std::vector<std::vector<float>> Negated(const std::vector<TrainDatum>& data) {
  std::vector<std::vector<float>> out;
  for (const TrainDatum& datum : data) {
    std::vector<float> d;
    for (float w : datum.weights) d.push_back(-w);
    out.push_back(d);
  }
  return out;
}

std::vector<std::vector<float>> Logprobs(Trainer& trainer,
                                         const std::vector<TrainDatum>& data,
                                         const ForwardOptions& options) {
  std::vector<std::vector<float>> out(data.size());
  auto outcome = trainer.Forward(data, options, [&](DatumLogprobs done) {
    EXPECT_TRUE(out[done.index].empty());
    out[done.index] = std::move(done.logprobs);
  });
  EXPECT_TRUE(outcome.ok()) << outcome.status();
  return out;
}

std::vector<std::vector<float>> Gradients(Trainer& trainer) {
  std::vector<std::vector<float>> out;
  const ParamTable table(trainer.config());
  for (const ParamRow& row : table.rows()) {
    auto gradient = trainer.Gradient(row.hf_name);
    EXPECT_TRUE(gradient.ok());
    out.push_back(*std::move(gradient));
  }
  return out;
}

ForwardOptions Retain(const std::string& id) {
  ForwardOptions options;
  options.activation_id = id;
  return options;
}

ForwardOptions WithBackward() {
  ForwardOptions options;
  options.backward = true;
  return options;
}

class TrainerTest
    : public testing::TestWithParam<std::tuple<std::string, Precision>> {
 protected:
  // Micro-batches of 16 tokens, one datum beyond it.
  TrainerOptions Small(int64_t activation_bytes = 0) {
    TrainerOptions options;
    options.precision = std::get<1>(GetParam());
    options.micro_batch_tokens = 16;
    options.max_context = 32;
    options.activation_bytes = activation_bytes;
    return options;
  }
  Rig Make(const TrainerOptions& options) {
    return gradwire::Make(std::get<0>(GetParam()), options);
  }
};

TEST_P(TrainerTest, RetainedEqualsFusedBitForBit) {
  Rig fused = Make(Small()), retained = Make(Small(16 << 20));
  const auto data = Batch(fused.trainer->config().vocab);
  const auto fused_logprobs = Logprobs(*fused.trainer, data, WithBackward());
  const auto logprobs = Logprobs(*retained.trainer, data, Retain("a"));
  EXPECT_EQ(logprobs, fused_logprobs);
  auto outcome = retained.trainer->Backward("a", Negated(data), false);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_FALSE(outcome->recomputed);
  EXPECT_EQ(Gradients(*retained.trainer), Gradients(*fused.trainer));
}

TEST_P(TrainerTest, RecomputedAndEvictedEqualRetainedBitForBit) {
  Rig roomy = Make(Small(16 << 20));
  const auto data = Batch(roomy.trainer->config().vocab);
  Logprobs(*roomy.trainer, data, Retain("a"));
  ASSERT_TRUE(roomy.trainer->Backward("a", Negated(data), false).ok());
  const auto expected = Gradients(*roomy.trainer);

  // Room for the inputs of one micro-batch's layers, no more: micro-batches
  // are not kept, or not in full.
  Rig tight = Make(Small(1));
  auto forward =
      tight.trainer->Forward(data, Retain("a"), [](DatumLogprobs) {});
  ASSERT_TRUE(forward.ok());
  EXPECT_FALSE(forward->retained);
  auto backward = tight.trainer->Backward("a", Negated(data), false);
  ASSERT_TRUE(backward.ok()) << backward.status();
  EXPECT_TRUE(backward->recomputed);
  EXPECT_EQ(Gradients(*tight.trainer), expected);

  // Kept at first, then pushed out by a built-in loss.
  const int64_t one_batch = tight.trainer->plan().activations * 8;
  Rig evicting = Make(Small(one_batch));
  Logprobs(*evicting.trainer, data, Retain("a"));
  for (int i = 0; i < 6; ++i) {
    Logprobs(*evicting.trainer, data, Retain("b" + std::to_string(i)));
  }
  Logprobs(*evicting.trainer, data, WithBackward());
  evicting.trainer->ZeroGrad();
  backward = evicting.trainer->Backward("a", Negated(data), false);
  ASSERT_TRUE(backward.ok());
  EXPECT_EQ(Gradients(*evicting.trainer), expected);
}

TEST_P(TrainerTest, ForwardChangesNothingAndRepeats) {
  Rig rig = Make(Small());
  const auto data = Batch(rig.trainer->config().vocab);
  const auto first = Logprobs(*rig.trainer, data, {});
  EXPECT_EQ(Logprobs(*rig.trainer, data, {}), first);
  EXPECT_EQ(Logprobs(*rig.trainer, data, WithBackward()), first);
  rig.trainer->ZeroGrad();
  Logprobs(*rig.trainer, data, {});
  for (const auto& gradient : Gradients(*rig.trainer)) {
    for (float g : gradient) ASSERT_EQ(g, 0.0f);
  }
  EXPECT_EQ(rig.trainer->weight_version(), 0);
}

// A tree: all datums begin alike, two of them go on alike, one is the beginning
// of another, one differs in a target alone.
std::vector<TrainDatum> Family(int64_t vocab) {
  const auto datum = [&](const std::vector<int32_t>& tokens) {
    TrainDatum d;
    for (size_t t = 0; t < tokens.size(); ++t) {
      d.tokens.push_back(static_cast<int32_t>(tokens[t] * 7919 % vocab));
      const int32_t next = t + 1 < tokens.size() ? tokens[t + 1] : 3;
      d.targets.push_back(static_cast<int32_t>(next * 7919 % vocab));
      d.weights.push_back(t < 4 ? 0.0f : 0.25f * static_cast<float>(t) - 1.5f);
    }
    return d;
  };
  std::vector<TrainDatum> data = {
      datum({1, 2, 3, 4, 5, 6, 7, 8}), datum({1, 2, 3, 4, 5, 9, 10}),
      datum({1, 2, 3, 4, 5, 9, 11, 12, 13}), datum({1, 2, 3}),
      datum({1, 2, 3, 4, 5, 6, 7, 8})};
  data.back().targets[6] = static_cast<int32_t>(5 % vocab);
  // A weight within the part that all share.
  data[1].weights[2] = 0.5f;
  return data;
}

TEST_P(TrainerTest, SharedBeginningsAreComputedOnceAndGiveTheSame) {
  TrainerOptions options = Small();
  options.micro_batch_tokens = 64;
  Rig together = Make(options), apart = Make(options);
  const auto data = Family(together.trainer->config().vocab);
  const auto logprobs = Logprobs(*together.trainer, data, WithBackward());
  // Both are sums of results that were each rounded on their own way, a dozen
  // in a block; the errors add like a random walk.
  const bool f32 = std::get<1>(GetParam()) == Precision::kF32;
  const double layers = static_cast<double>(together.trainer->config().layers);
  // Sums are float32 in both; in f32 their terms' roundings count as well.
  const double terms =
      f32 ? static_cast<double>(together.trainer->config().ffn) : 1;
  const double sigma = std::ldexp(1.0, f32 ? -24 : -8) *
                       std::sqrt(2 * 12 * (2 * layers + 2) * terms);
  for (size_t i = 0; i < data.size(); ++i) {
    const auto alone = Logprobs(*apart.trainer, {data[i]}, WithBackward());
    ASSERT_EQ(alone[0].size(), logprobs[i].size());
    for (size_t t = 0; t < alone[0].size(); ++t) {
      EXPECT_NEAR(alone[0][t], logprobs[i][t],
                  4 * sigma * std::fabs(alone[0][t]))
          << i << ", " << t;
    }
  }
  const auto expected = Gradients(*apart.trainer);
  const auto got = Gradients(*together.trainer);
  double difference = 0, norm = 0;
  for (size_t p = 0; p < expected.size(); ++p) {
    for (size_t i = 0; i < expected[p].size(); ++i) {
      const double want = expected[p][i], off = got[p][i] - want;
      difference += off * off;
      norm += want * want;
    }
  }
  EXPECT_GT(norm, 0);
  EXPECT_LE(std::sqrt(difference), 4 * sigma * std::sqrt(norm));
}

TEST_P(TrainerTest, SharedBeginningsKeepEveryBitOfACustomStep) {
  TrainerOptions options = Small(16 << 20);
  options.micro_batch_tokens = 64;
  Rig fused = Make(options), retained = Make(options);
  options.activation_bytes = 1;
  Rig tight = Make(options);
  const auto data = Family(fused.trainer->config().vocab);
  const auto expected = Logprobs(*fused.trainer, data, WithBackward());
  for (Rig* rig : {&retained, &tight}) {
    EXPECT_EQ(Logprobs(*rig->trainer, data, Retain("a")), expected);
    ASSERT_TRUE(rig->trainer->Backward("a", Negated(data), false).ok());
    EXPECT_EQ(Gradients(*rig->trainer), Gradients(*fused.trainer));
  }
}

// However the datums are ordered and split, each has the same logprobs: a
// token's row goes through the same sums whatever else is in the micro-batch.
TEST_P(TrainerTest, OrderAndSplitOfDatumsDoNotMatter) {
  Rig rig = Make(Small());
  const auto data = Batch(rig.trainer->config().vocab);
  const auto together = Logprobs(*rig.trainer, data, {});
  for (size_t i = 0; i < data.size(); ++i) {
    const auto alone = Logprobs(*rig.trainer, {data[i]}, {});
    ASSERT_EQ(alone[0].size(), together[i].size());
    for (size_t t = 0; t < alone[0].size(); ++t) {
      // Blocking by rows may differ; sums of at most 256 float32 terms, each
      // of the size of a logit, and roundings of the activations.
      const double u = std::get<1>(GetParam()) == Precision::kF32
                           ? std::ldexp(1.0, -24) * 16
                           : std::ldexp(1.0, -8);
      EXPECT_NEAR(alone[0][t], together[i][t],
                  16 * u * std::fabs(together[i][t]));
    }
  }
  const std::vector<TrainDatum> reversed(data.rbegin(), data.rend());
  const auto back = Logprobs(*rig.trainer, reversed, {});
  for (size_t i = 0; i < data.size(); ++i) {
    for (size_t t = 0; t < together[i].size(); ++t) {
      const double u = std::get<1>(GetParam()) == Precision::kF32
                           ? std::ldexp(1.0, -24) * 16
                           : std::ldexp(1.0, -8);
      EXPECT_NEAR(back[data.size() - 1 - i][t], together[i][t],
                  16 * u * std::fabs(together[i][t]));
    }
  }
}

TEST_P(TrainerTest, CallsAccumulate) {
  Rig once = Make(Small()), twice = Make(Small());
  auto data = Batch(once.trainer->config().vocab);
  // Cut where a micro-batch ends: 7 + 1 | 13 | 4 | 31 | 2.
  const std::vector<TrainDatum> head(data.begin(), data.begin() + 2);
  const std::vector<TrainDatum> tail(data.begin() + 2, data.end());
  Logprobs(*once.trainer, data, WithBackward());
  Logprobs(*twice.trainer, head, WithBackward());
  Logprobs(*twice.trainer, tail, WithBackward());
  EXPECT_EQ(Gradients(*twice.trainer), Gradients(*once.trainer));
  for (auto normalization :
       {GradientNormalization::kNone, GradientNormalization::kNumLossTokens,
        GradientNormalization::kNumSequences}) {
    OptimParams params;
    params.normalization = normalization;
    auto a = once.trainer->OptimStep(params);
    auto b = twice.trainer->OptimStep(params);
    ASSERT_TRUE(a.ok() && b.ok());
    EXPECT_EQ(a->grad_norm, b->grad_norm);
    EXPECT_EQ(a->loss_tokens, b->loss_tokens);
    Logprobs(*once.trainer, data, WithBackward());
    Logprobs(*twice.trainer, head, WithBackward());
    Logprobs(*twice.trainer, tail, WithBackward());
  }
  EXPECT_EQ(Gradients(*twice.trainer), Gradients(*once.trainer));
}

// The norm comes from sums of squares that the backward has kept up, in one
// micro-batch or several, with and without a table of its own for the head.
TEST_P(TrainerTest, TheNormIsThatOfTheGradient) {
  Rig rig = Make(Small());
  OptimParams params;
  params.normalization = GradientNormalization::kNone;
  for (const uint32_t window : {1u, 2u}) {
    for (uint32_t call = 0; call < window; ++call) {
      Logprobs(*rig.trainer, Batch(rig.trainer->config().vocab, window + call),
               WithBackward());
    }
    double squares = 0, elements = 0;
    for (const auto& gradient : Gradients(*rig.trainer)) {
      for (const float g : gradient) squares += double{g} * double{g};
      elements += static_cast<double>(gradient.size());
    }
    const auto outcome = rig.trainer->OptimStep(params);
    ASSERT_TRUE(outcome.ok());
    const double roundoff = 1.0 / (int64_t{1} << 53);
    EXPECT_NEAR(outcome->grad_norm, std::sqrt(squares),
                elements * roundoff * std::sqrt(squares));
  }
}

// The accumulator is not zeroed between windows but written anew.
TEST_P(TrainerTest, AWindowSeesNothingOfTheOneBefore) {
  Rig used = Make(Small()), fresh = Make(Small());
  const int64_t vocab = used.trainer->config().vocab;
  const auto first = Batch(vocab, 1), second = Batch(vocab, 2);
  OptimParams still;
  still.learning_rate = 0;
  Logprobs(*used.trainer, first, WithBackward());
  const auto left = used.trainer->OptimStep(still);
  ASSERT_TRUE(left.ok());
  EXPECT_GT(left->grad_norm, 0);
  for (const auto& gradient : Gradients(*used.trainer)) {
    EXPECT_EQ(gradient, std::vector<float>(gradient.size()));
  }
  Logprobs(*used.trainer, second, WithBackward());
  Logprobs(*fresh.trainer, second, WithBackward());
  EXPECT_EQ(Gradients(*used.trainer), Gradients(*fresh.trainer));
  used.trainer->ZeroGrad();
  Logprobs(*used.trainer, second, WithBackward());
  EXPECT_EQ(Gradients(*used.trainer), Gradients(*fresh.trainer));

  // An operation whose gradient is zero everywhere begins no window.
  ASSERT_TRUE(used.trainer->OptimStep(still).ok());
  auto silent = second;
  for (TrainDatum& datum : silent) {
    datum.weights.assign(datum.weights.size(), 0.0f);
  }
  Logprobs(*used.trainer, silent, WithBackward());
  const auto zero = used.trainer->OptimStep(still);
  ASSERT_TRUE(zero.ok());
  EXPECT_FALSE(zero->skipped);
  EXPECT_EQ(zero->grad_norm, 0);
}

TEST_P(TrainerTest, StaleActivationsAreRefusedOrRecomputed) {
  Rig rig = Make(Small()), fresh = Make(Small());
  const auto data = Batch(rig.trainer->config().vocab);
  for (Rig* each : {&rig, &fresh}) {
    Logprobs(*each->trainer, data, WithBackward());
  }
  Logprobs(*rig.trainer, data, Retain("a"));
  for (Rig* each : {&rig, &fresh}) {
    auto step = each->trainer->OptimStep({});
    ASSERT_TRUE(step.ok());
    EXPECT_FALSE(step->skipped);
    EXPECT_EQ(each->trainer->weight_version(), 1);
  }
  auto refused = rig.trainer->Backward("a", Negated(data), false);
  EXPECT_EQ(Reason(refused.status()), "ACTIVATIONS_STALE");
  auto step = rig.trainer->OptimStep({});
  ASSERT_TRUE(step.ok());
  EXPECT_TRUE(step->skipped) << "a refused backward added something";
  auto allowed = rig.trainer->Backward("a", Negated(data), true);
  ASSERT_TRUE(allowed.ok()) << allowed.status();
  EXPECT_TRUE(allowed->recomputed);
  Logprobs(*fresh.trainer, data, WithBackward());
  EXPECT_EQ(Gradients(*rig.trainer), Gradients(*fresh.trainer));
  // The id has been used.
  EXPECT_EQ(Reason(rig.trainer->Backward("a", Negated(data), true).status()),
            "ACTIVATIONS_EXPIRED");
}

TEST_P(TrainerTest, BadGradientsAreRefusedAndAddNothing) {
  Rig rig = Make(Small());
  const auto data = Batch(rig.trainer->config().vocab);
  Logprobs(*rig.trainer, data, Retain("a"));
  auto d = Negated(data);
  d[2].pop_back();
  EXPECT_EQ(Reason(rig.trainer->Backward("a", d, false).status()),
            "SHAPE_MISMATCH");
  d = Negated(data);
  d.pop_back();
  EXPECT_EQ(Reason(rig.trainer->Backward("a", d, false).status()),
            "SHAPE_MISMATCH");
  d = Negated(data);
  d[4][3] = std::nanf("");
  auto refused = rig.trainer->Backward("a", d, false);
  EXPECT_EQ(Reason(refused.status()), "NONFINITE_INPUT");
  EXPECT_EQ(GetErrorDetail(refused.status())->metadata["datum_index"], "4");
  EXPECT_EQ(GetErrorDetail(refused.status())->metadata["position"], "3");
  // A part of the datums is legal; the others count as zero.
  d = Negated(data);
  d[0].clear();
  auto outcome = rig.trainer->Backward("a", d, false);
  ASSERT_TRUE(outcome.ok());
  EXPECT_EQ(outcome->metrics["sequences:sum"], 5);
}

TEST_P(TrainerTest, StepsAreRefusedByCountAndByTaint) {
  Rig rig = Make(Small());
  const auto data = Batch(rig.trainer->config().vocab);
  const auto before = rig.trainer->Weight("model.norm.weight");
  OptimParams params;
  params.expected_ops = 2;
  Logprobs(*rig.trainer, data, WithBackward());
  EXPECT_EQ(Reason(rig.trainer->OptimStep(params).status()),
            "ACCUMULATION_MISMATCH");
  params.expected_ops = 0;
  auto step = rig.trainer->OptimStep(params);
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_TRUE(step->skipped) << "the refused step must drop the gradients";

  // A huge weight makes the gradient infinite.
  auto huge = data;
  for (float& w : huge[4].weights) w = 3e38f;
  Logprobs(*rig.trainer, huge, {});
  auto outcome =
      rig.trainer->Forward(huge, WithBackward(), [](DatumLogprobs) {});
  EXPECT_EQ(Reason(outcome.status()), "NONFINITE_OUTPUT");
  params.expected_ops = -1;
  EXPECT_EQ(Reason(rig.trainer->OptimStep(params).status()),
            "GRADIENTS_TAINTED");
  EXPECT_TRUE(rig.trainer->OptimStep(params)->skipped);
  EXPECT_EQ(*rig.trainer->Weight("model.norm.weight"), *before);
  EXPECT_EQ(rig.trainer->optimizer_step(), 0);
}

TEST_P(TrainerTest, AnInfiniteGradientLeavesTheWeights) {
  Rig rig = Make(Small());
  auto data = Batch(rig.trainer->config().vocab);
  const auto before = rig.trainer->Weight("model.norm.weight");
  auto d = Negated(data);
  for (float& g : d[4]) g = 3e38f;
  Logprobs(*rig.trainer, data, Retain("a"));
  ASSERT_TRUE(rig.trainer->Backward("a", d, false).ok());
  EXPECT_EQ(Reason(rig.trainer->OptimStep({}).status()), "NONFINITE_GRADIENT");
  EXPECT_EQ(*rig.trainer->Weight("model.norm.weight"), *before);
  EXPECT_TRUE(rig.trainer->OptimStep({})->skipped);
  Logprobs(*rig.trainer, data, WithBackward());
  EXPECT_TRUE(rig.trainer->OptimStep({}).ok()) << "the next batch is clean";
}

TEST_P(TrainerTest, ExportedWeightsLoadAsTheyWere) {
  Rig rig = Make(Small());
  const auto data = Batch(rig.trainer->config().vocab);
  Logprobs(*rig.trainer, data, WithBackward());
  ASSERT_TRUE(rig.trainer->OptimStep({}).ok());
  const std::string directory =
      testing::TempDir() + "/exported_" + std::get<0>(GetParam()) +
      std::to_string(std::get<1>(GetParam()) == Precision::kF32);
  std::filesystem::remove_all(directory);
  auto exported = rig.trainer->Export(directory);
  ASSERT_TRUE(exported.ok()) << exported.status();
  EXPECT_GT(exported->bytes, 0);
  EXPECT_EQ(exported->digest.size(), 32u);
  EXPECT_EQ(Reason(rig.trainer->Export(directory).status()), "SNAPSHOT_EXISTS");
  Rig again;
  TrainerOptions options = Small();
  options.model_directory = directory;
  auto loaded = Trainer::Create(
      options, *again.device, *again.kernels, [](const MemoryPlan&) {},
      [](double) {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(Logprobs(**loaded, data, {}), Logprobs(*rig.trainer, data, {}));
}

TEST_P(TrainerTest, TheMasterIsWhatTheFilesHold) {
  Rig rig = Make(Small());
  TrainerOptions options = Small();
  options.precision = Precision::kF32;
  Rig whole = Make(options);
  const ParamTable table(rig.trainer->config());
  for (const ParamRow& row : table.rows()) {
    EXPECT_EQ(*rig.trainer->Weight(row.hf_name),
              *whole.trainer->Weight(row.hf_name))
        << row.hf_name;
  }
  // 16 bytes a parameter in either precision, up to the halves' alignment.
  const auto bytes = [](const Trainer& trainer) {
    const MemoryPlan& plan = trainer.plan();
    return plan.weights + plan.gradients + plan.optimizer;
  };
  EXPECT_NEAR(bytes(*rig.trainer), bytes(*whole.trainer),
              2 * Arena::kAlignment);
}

TEST_P(TrainerTest, ForwardOnlyComputesTheSameFromLess) {
  TrainerOptions options = Small();
  Rig rig = Make(options);
  options.forward_only = true;
  Rig frozen = Make(options);
  const auto data = Batch(rig.trainer->config().vocab);
  EXPECT_EQ(Logprobs(*frozen.trainer, data, {}),
            Logprobs(*rig.trainer, data, {}));
  const bool bf16 = options.precision == Precision::kBF16;
  EXPECT_EQ(frozen.trainer->plan().weights * (bf16 ? 2 : 1),
            rig.trainer->plan().weights);
  const std::string name = "model.norm.weight";
  const auto master = *rig.trainer->Weight(name);
  const auto weights = *frozen.trainer->Weight(name);
  for (size_t i = 0; i < master.size(); ++i) {
    EXPECT_EQ(weights[i], bf16 ? static_cast<float>(SplitHalves(master[i]).high)
                               : master[i]);
  }
}

TEST_P(TrainerTest, ShortMomentsTakeHalfTheMemoryAndRepeat) {
  TrainerOptions options = Small();
  Rig whole = Make(options);
  options.moment_precision = Precision::kBF16;
  Rig rig = Make(options), again = Make(options);
  EXPECT_NEAR(2 * rig.trainer->plan().optimizer,
              whole.trainer->plan().optimizer, 4 * Arena::kAlignment);
  const auto data = Batch(rig.trainer->config().vocab);
  std::vector<std::vector<float>> weights;
  for (Rig* each : {&rig, &again, &whole}) {
    for (int i = 0; i < 3; ++i) {
      Logprobs(*each->trainer, data, WithBackward());
      ASSERT_TRUE(each->trainer->OptimStep({}).ok());
    }
    weights.push_back(*each->trainer->Weight("model.embed_tokens.weight"));
  }
  EXPECT_EQ(weights[0], weights[1]);
  EXPECT_NE(weights[0], weights[2]) << "nothing was rounded";
}

TEST_P(TrainerTest, ResetDropsWhatAnotherHandleLeft) {
  Rig rig = Make(Small());
  const auto data = Batch(rig.trainer->config().vocab);
  Logprobs(*rig.trainer, data, WithBackward());
  Logprobs(*rig.trainer, data, Retain("a"));
  EXPECT_EQ(rig.trainer->Reset(), 1);
  EXPECT_EQ(Reason(rig.trainer->Backward("a", Negated(data), false).status()),
            "ACTIVATIONS_EXPIRED");
  EXPECT_TRUE(rig.trainer->OptimStep({})->skipped);
}

INSTANTIATE_TEST_SUITE_P(
    Models, TrainerTest,
    testing::Combine(testing::Values("llama_gqa3_tied", "qwen2_untied",
                                     "qwen3_head_dim"),
                     testing::Values(Precision::kF32, Precision::kBF16)),
    [](const auto& info) {
      return std::get<0>(info.param) +
             (std::get<1>(info.param) == Precision::kF32 ? "_f32" : "_bf16");
    });

TEST(TrainerCreateTest, WhatDoesNotFitIsRefusedWithTheNumbers) {
  Rig rig;
  TrainerOptions options;
  options.model_directory = std::string(kData) + "llama_gqa3_tied";
  options.activation_bytes = int64_t{1} << 50;
  bool planned = false;
  auto trainer = Trainer::Create(
      options, *rig.device, *rig.kernels,
      [&](const MemoryPlan&) { planned = true; }, [](double) {});
  ASSERT_FALSE(trainer.ok());
  auto detail = GetErrorDetail(trainer.status());
  EXPECT_EQ(detail->reason, "MEMORY_PLAN_EXCEEDED");
  EXPECT_GT(std::stoll(detail->metadata["value"]), int64_t{1} << 50);
  EXPECT_GT(std::stoll(detail->metadata["limit"]), 0);
  EXPECT_FALSE(planned);
}

// Whether its moments are present before any step.
bool IsPresentBeforeUse(const TrainerOptions& options) {
  const Rig rig = Make("llama_gqa3_tied", options);
  if (rig.trainer == nullptr) return false;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  while (std::chrono::steady_clock::now() < end) {
    const MemoryUse use = rig.trainer->memory_use();
    if (use.gradients == rig.trainer->plan().gradients &&
        use.optimizer == rig.trainer->plan().optimizer && use.optimizer > 0) {
      return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(rig.trainer->memory_use().optimizer, 0);
  return false;
}

TEST(TrainerCreateTest, MemoryIsMadePresentForOneRank) {
  TrainerOptions options;
  const bool present = IsPresentBeforeUse(options);
  if (!Prefault::HasOneMemory()) {
    EXPECT_FALSE(present);
    return;
  }
  EXPECT_TRUE(present);
  // Others have yet to see what there is.
  options.ranks_on_host = 2;
  EXPECT_FALSE(IsPresentBeforeUse(options));
  options.ranks_on_host = 1;
  options.forward_only = true;
  EXPECT_FALSE(IsPresentBeforeUse(options));
}

TEST(TrainerCreateTest, MissingModelIsNamed) {
  Rig rig;
  TrainerOptions options;
  options.model_directory = testing::TempDir() + "/nothing";
  auto trainer = Trainer::Create(
      options, *rig.device, *rig.kernels, [](const MemoryPlan&) {},
      [](double) {});
  EXPECT_EQ(trainer.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Reason(trainer.status()), "MODEL_FILE_NOT_FOUND");
}

}  // namespace
}  // namespace gradwire
