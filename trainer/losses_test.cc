// SPDX-License-Identifier: Apache-2.0
#include "trainer/losses.h"

#include <cmath>
#include <limits>

#include "base/error.h"
#include "gtest/gtest.h"

namespace gradwire {
namespace {

TrainDatum Datum(int64_t n) {
  TrainDatum d;
  d.tokens.assign(n, 1);
  d.targets.assign(n, 2);
  return d;
}

// One position with ratio exp(logprob), because its old logprob is 0.
struct Result {
  double loss = 0;
  float grad = 0;
  LossTotals totals;
};

Result One(const LossSpec& spec, float logprob, float advantage) {
  TrainDatum d = Datum(1);
  if (spec.name != "cross_entropy") {
    d.logprobs = {0};
    d.advantages = {advantage};
  }
  Result r;
  auto grads = ComputeLoss(spec, d, {logprob}, r.totals);
  EXPECT_TRUE(grads.ok());
  if (grads.ok()) r.grad = (*grads)[0];
  r.loss = r.totals.loss;
  return r;
}

TEST(LossesTest, CrossEntropyKeepsSignsFractionsAndZeros) {
  TrainDatum d = Datum(3);
  d.weights = {-2.0f, 0.0f, 0.5f};
  LossTotals totals;
  auto grads = ComputeLoss({}, d, {-1.0f, -4.0f, -2.0f}, totals);
  ASSERT_TRUE(grads.ok());
  EXPECT_EQ(*grads, (std::vector<float>{2.0f, 0.0f, -0.5f}));
  EXPECT_EQ(totals.loss, -1.0);
  EXPECT_EQ(totals.loss_tokens, 2);
  EXPECT_EQ(totals.sequences, 1);
}

TEST(LossesTest, ManyTargetsCountAPositionOnce) {
  TrainDatum d = Datum(2);
  d.k = 2;
  d.weights = {1, 3, 0, 0};
  LossTotals totals;
  auto grads = ComputeLoss({}, d, {-1, -2, -3, -4}, totals);
  ASSERT_TRUE(grads.ok());
  EXPECT_EQ(*grads, (std::vector<float>{-1, -3, 0, 0}));
  EXPECT_EQ(totals.loss, 7.0);
  EXPECT_EQ(totals.loss_tokens, 1);
}

TEST(LossesTest, ADatumWithoutGradientIsNotCounted) {
  EXPECT_EQ(One({"ppo", {}}, 1.0f, 1.0f).totals.loss_tokens, 0);
  EXPECT_EQ(One({"ppo", {}}, 1.0f, 1.0f).totals.sequences, 0);
  EXPECT_EQ(One({"ppo", {}}, 1.0f, -1.0f).totals.sequences, 1);
}

// Away from the kinks the gradient is the slope of the value. The tolerance is
// the rounding of two float32 values over the step plus the next term of the
// difference.
TEST(LossesTest, GradientsAreTheSlopes) {
  const double h = 1.0 / 128;
  const double eps = std::numeric_limits<float>::epsilon();
  for (const char* name :
       {"cross_entropy", "importance_sampling", "ppo", "dro", "dapo", "gspo"}) {
    for (float logprob : {-0.7f, -0.1f, 0.1f, 0.7f}) {
      for (float advantage : {-1.5f, 2.0f}) {
        LossSpec spec{name, {}};
        const float lo = static_cast<float>(logprob - h);
        const float hi = static_cast<float>(logprob + h);
        const Result up = One(spec, hi, advantage);
        const Result down = One(spec, lo, advantage);
        const double slope = (up.loss - down.loss) / (double{hi} - double{lo});
        const double third = std::exp(logprob + h) * std::fabs(advantage);
        const double magnitude =
            std::fabs(up.loss) + std::fabs(down.loss) + third;
        EXPECT_NEAR(One(spec, logprob, advantage).grad, slope,
                    third * h * h / 6 + 4 * eps * magnitude / h)
            << name << " " << logprob << " " << advantage;
      }
    }
  }
}

TEST(LossesTest, CispoHoldsTheRatioConstant) {
  const LossSpec spec{"cispo", {{"clip_high_threshold", 2.0}}};
  const Result r = One(spec, 1.0f, 3.0f);
  EXPECT_EQ(r.grad, -6.0f);
  EXPECT_EQ(r.loss, -6.0);
  EXPECT_EQ(r.totals.clipped, 1);
}

TEST(LossesTest, GradientFlowsAtTheBounds) {
  // exp(0) = 1 exactly.
  const LossSpec at_high{"ppo", {{"clip_high_threshold", 1.0}}};
  EXPECT_EQ(One(at_high, 0.0f, 2.0f).grad, -2.0f);
  const LossSpec at_low{"ppo", {{"clip_low_threshold", 1.0}}};
  EXPECT_EQ(One(at_low, 0.0f, -2.0f).grad, 2.0f);
}

TEST(LossesTest, TheCapClampsTheRatioAndZeroTurnsItOff) {
  const LossSpec cap{"importance_sampling", {{"ratio_log_cap", 1.0}}};
  EXPECT_EQ(One(cap, 1.0f, 1.0f).grad, -std::exp(1.0f));
  EXPECT_EQ(One(cap, 1.5f, 1.0f).grad, 0.0f);
  EXPECT_EQ(One(cap, 1.5f, 1.0f).loss, -std::exp(1.0f));
  EXPECT_EQ(One(cap, -1.5f, 1.0f).loss, -std::exp(-1.0f));
  const LossSpec off{"importance_sampling", {{"ratio_log_cap", 0.0}}};
  EXPECT_EQ(One(off, 25.0f, 1.0f).grad, -std::exp(25.0f));
}

TEST(LossesTest, DualClipBoundsNegativeAdvantages) {
  const LossSpec spec{"dapo", {{"eps_clip_c", 2.0}}};
  EXPECT_EQ(One(spec, 1.0f, -1.0f).grad, 0.0f);
  EXPECT_EQ(One(spec, 1.0f, -1.0f).loss, 2.0);
  EXPECT_EQ(One({"dapo", {}}, 1.0f, -1.0f).grad, std::exp(1.0f));
}

TEST(LossesTest, ThresholdsOfAPositionOverrideTheConfig) {
  TrainDatum d = Datum(2);
  d.logprobs = {0, 0};
  d.advantages = {1, 1};
  d.clip_low = {0, 0};
  d.clip_high = {3, 1};
  LossTotals totals;
  auto grads = ComputeLoss({"ppo", {}}, d, {1, 1}, totals);
  ASSERT_TRUE(grads.ok());
  EXPECT_EQ(*grads, (std::vector<float>{-std::exp(1.0f), 0}));
  EXPECT_EQ(totals.Metrics()["clip_fraction:mean"], 0.5);
  EXPECT_EQ(totals.Metrics()["logprob_gap:mean"], 1.0);
}

TEST(LossesTest, GspoAveragesOverItsCountedPositions) {
  TrainDatum d = Datum(3);
  d.logprobs = {0, 0, 0};
  d.advantages = {0, 1, 1};
  const std::vector<float> logprobs = {-3, 0.25f, -0.125f};
  LossTotals totals;
  auto grads = ComputeLoss({"gspo", {}}, d, logprobs, totals);
  ASSERT_TRUE(grads.ok());
  EXPECT_EQ((*grads)[0], 0.0f);
  EXPECT_EQ((*grads)[1], -std::exp(0.0625f));
  EXPECT_EQ((*grads)[2], -std::exp(0.0625f));
  d.sequence_ratio_mask = {0, 0, 1};
  grads = ComputeLoss({"gspo", {}}, d, logprobs, totals);
  ASSERT_TRUE(grads.ok());
  EXPECT_EQ((*grads)[1], -std::exp(-0.125f));
}

TEST(LossesTest, GspoCapStopsTheGradient) {
  const LossSpec spec{"gspo", {{"seq_ratio_log_cap", 0.5}}};
  EXPECT_EQ(One(spec, 1.0f, -1.0f).grad, 0.0f);
  EXPECT_EQ(One(spec, 1.0f, -1.0f).loss, double{std::exp(0.5f)});
}

TEST(LossesTest, NonFiniteResultsAreTheServersAndAddNothing) {
  LossTotals totals;
  auto grads = ComputeLoss({}, Datum(1), {-INFINITY}, totals);
  ASSERT_FALSE(grads.ok());
  const auto detail = GetErrorDetail(grads.status());
  ASSERT_TRUE(detail.has_value());
  EXPECT_EQ(detail->reason, "NONFINITE_OUTPUT");
  EXPECT_EQ(detail->category, ErrorCategory::kServer);
  EXPECT_EQ(totals.loss, 0.0);
  EXPECT_EQ(totals.loss_tokens, 0);
}

std::string CheckReason(const LossSpec& spec) {
  const auto detail = GetErrorDetail(CheckLossSpec(spec));
  return detail ? detail->reason : "";
}

TEST(LossesTest, SettingsAreCheckedByName) {
  EXPECT_EQ(CheckReason({"ppo", {{"clip_low_threshold", 0.5}}}), "");
  EXPECT_EQ(CheckReason({"mse", {}}), "UNKNOWN_LOSS");
  EXPECT_EQ(CheckReason({"ppo", {{"kl_beta", 0.1}}}), "UNKNOWN_LOSS_CONFIG");
  const char* range = "LOSS_CONFIG_OUT_OF_RANGE";
  EXPECT_EQ(CheckReason({"ppo", {{"clip_low_threshold", 1.3}}}), range);
  EXPECT_EQ(CheckReason({"dro", {{"beta", NAN}}}), range);
  EXPECT_EQ(CheckReason({"dro", {{"beta", -1.0}}}), range);
  EXPECT_EQ(CheckReason({"dapo", {{"eps_clip_c", 1.0}}}), range);
}

TEST(LossesTest, AClientsGradientIsCountedByPosition) {
  LossTotals totals;
  CountGradient({0, -1, 0, 0, 2, 3}, 2, totals);
  EXPECT_EQ(totals.loss_tokens, 2);
  EXPECT_EQ(totals.sequences, 1);
  CountGradient({0, 0}, 1, totals);
  EXPECT_EQ(totals.sequences, 1);
}

}  // namespace
}  // namespace gradwire
