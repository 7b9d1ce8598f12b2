// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/profile/step_profile.h"

#include "gtest/gtest.h"

namespace gradwire {
namespace {

// Powers of two, so that sums are exact.
const std::vector<std::map<std::string, OpTotal>> kTotals = {
    {{"add", {4, 0.125, {0, 1e9}}}, {"matmul", {2, 0.25, {8e9, 1e9}}}},
    {{"add", {4, 0.125, {0, 1e9}}}, {"matmul", {2, 0.75, {8e9, 1e9}}}},
};
const std::vector<double> kWall = {0.5, 1.0};

TEST(SummarizeTest, RowsAddUpToTheWallTime) {
  const StepProfile profile = Summarize(kTotals, kWall);
  double sum = profile.outside.MeanSeconds();
  for (const ProfileRow& row : profile.ops) sum += row.MeanSeconds();
  EXPECT_EQ(sum, profile.step.MeanSeconds());
  EXPECT_EQ(profile.step.MeanSeconds(), 0.75);
  EXPECT_EQ(profile.outside.MeanSeconds(), 0.125);
}

TEST(SummarizeTest, TheLongestOpComesFirstWithTheWorkOfOneStep) {
  const StepProfile profile = Summarize(kTotals, kWall);
  ASSERT_EQ(profile.ops.size(), 2u);
  EXPECT_EQ(profile.ops[0].op, "matmul");
  EXPECT_EQ(profile.ops[0].calls, 2);
  EXPECT_EQ(profile.ops[0].work.flops, 8e9);
  EXPECT_EQ(profile.ops[0].MeanSeconds(), 0.5);
}

TEST(ShareOfCeilingTest, ProductsAndPassesHaveTheirOwn) {
  const StepProfile profile = Summarize(kTotals, kWall);
  const Ceilings ceilings = {.gemm_flops = 32e9, .triad_bytes = 16e9};
  EXPECT_EQ(ShareOfCeiling(profile.ops[0], ceilings), 0.5);
  EXPECT_EQ(ShareOfCeiling(profile.ops[1], ceilings), 0.5);
}

TEST(TableTest, EndsWithWhatIsOutsideAndTheWhole) {
  const std::string table = Summarize(kTotals, kWall).Table({1e9, 1e9});
  const size_t matmul = table.find("matmul"), add = table.find("add");
  const size_t outside = table.find("outside ops");
  const size_t step = table.find("\nstep");
  EXPECT_LT(matmul, add);
  EXPECT_LT(add, outside);
  EXPECT_LT(outside, step);
  ASSERT_NE(step, std::string::npos);
  EXPECT_NE(table.find("100.0%", step), std::string::npos);
}

}  // namespace
}  // namespace gradwire
