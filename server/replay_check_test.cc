// SPDX-License-Identifier: Apache-2.0
#include "server/replay_check.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

namespace gradwire {
namespace {

constexpr int64_t kVersion = 4, kStep = 3;

v1::RankDone Done() {
  v1::RankDone done;
  done.set_weight_version(kVersion);
  done.set_optimizer_step(kStep);
  return done;
}

v1::RankDone Forward() {
  v1::RankDone done = Done();
  v1::ForwardResult& forward = *done.mutable_forward();
  forward.set_datum_count(2);
  auto& metrics = *forward.mutable_metrics();
  metrics["tokens:sum"] = 10;
  metrics["sequences:sum"] = 2;
  metrics["loss:sum"] = 50;
  metrics["ratio:max"] = 3;
  return done;
}

v1::RankDone Step() {
  v1::RankDone done = Done();
  v1::OptimStepResult& step = *done.mutable_optim_step();
  step.set_grad_norm(2);
  step.set_loss_tokens(10);
  step.set_sequences(2);
  return done;
}

v1::Operation Had(const v1::RankDone& done) {
  v1::Operation had;
  if (done.has_forward()) *had.mutable_forward() = done.forward();
  if (done.has_backward()) *had.mutable_backward() = done.backward();
  if (done.has_optim_step()) *had.mutable_optim_step() = done.optim_step();
  if (done.has_load_state()) *had.mutable_load_state() = done.load_state();
  return had;
}

using Change = std::function<void(v1::RankDone&)>;

bool Within(const v1::RankDone& had, const Change& change) {
  v1::RankDone has = had;
  change(has);
  return IsWithinTolerance(Had(had), kVersion, kStep, has);
}

Change Metric(const std::string& key, double value) {
  return
      [=](auto& d) { (*d.mutable_forward()->mutable_metrics())[key] = value; };
}

TEST(ReplayCheckTest, ALossMayDifferByRounding) {
  // 2 % of 51 and 0.02 for each of ten tokens.
  EXPECT_TRUE(Within(Forward(), Metric("loss:sum", 50)));
  EXPECT_TRUE(Within(Forward(), Metric("loss:sum", 51.1)));
  EXPECT_TRUE(Within(Forward(), Metric("loss:sum", 48.9)));
  EXPECT_FALSE(Within(Forward(), Metric("loss:sum", 51.3)));
  EXPECT_FALSE(Within(Forward(), Metric("loss:sum", 48.7)));
  EXPECT_FALSE(Within(Forward(), Metric("loss:sum", -50)));
  EXPECT_FALSE(Within(Forward(), Metric("loss:sum", NAN)));
  EXPECT_TRUE(Within(Forward(), Metric("ratio:max", 300)));
}

TEST(ReplayCheckTest, WhatIsCountedMayNotDiffer) {
  const std::vector<Change> forward = {
      Metric("tokens:sum", 11),
      Metric("sequences:sum", 3),
      Metric("another:sum", 0),
      [](auto& d) { d.mutable_forward()->mutable_metrics()->clear(); },
      [](auto& d) { d.mutable_forward()->set_datum_count(3); },
      [](auto& d) { d.set_weight_version(kVersion + 1); },
      [](auto& d) { d.set_optimizer_step(kStep - 1); },
      [](auto& d) { d.mutable_backward(); },
      [](auto& d) { d.mutable_error()->set_reason("X"); },
  };
  for (size_t i = 0; i < forward.size(); ++i) {
    EXPECT_FALSE(Within(Forward(), forward[i])) << i;
  }
  const std::vector<Change> step = {
      [](auto& d) { d.mutable_optim_step()->set_skipped(true); },
      [](auto& d) { d.mutable_optim_step()->set_loss_tokens(9); },
      [](auto& d) { d.mutable_optim_step()->set_sequences(1); },
      [](auto& d) { d.mutable_optim_step()->set_grad_norm(2.3); },
      [](auto& d) { d.mutable_optim_step()->set_grad_norm(1.7); },
      [](auto& d) { d.mutable_zero_grad(); },
  };
  for (size_t i = 0; i < step.size(); ++i) {
    EXPECT_FALSE(Within(Step(), step[i])) << i;
  }
  EXPECT_TRUE(Within(
      Step(), [](auto& d) { d.mutable_optim_step()->set_grad_norm(2.1); }));
}

TEST(ReplayCheckTest, WhatIsLoadedIsLoadedToTheBit) {
  v1::RankDone load = Done();
  load.mutable_load_state();
  EXPECT_FALSE(Within(load, [](auto&) {}));
}

}  // namespace
}  // namespace gradwire
