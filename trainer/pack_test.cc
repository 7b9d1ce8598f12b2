// SPDX-License-Identifier: Apache-2.0
#include "trainer/pack.h"

#include <gtest/gtest.h>

namespace gradwire {
namespace {

TrainDatum Datum(std::vector<int32_t> tokens, std::vector<int32_t> targets,
                 int64_t k = 1) {
  TrainDatum datum;
  datum.tokens = std::move(tokens);
  datum.targets = std::move(targets);
  datum.k = k;
  return datum;
}

MicroBatch All(const std::vector<TrainDatum>& data) {
  MicroBatch batch;
  batch.end = static_cast<int64_t>(data.size());
  for (const TrainDatum& datum : data) {
    batch.tokens += static_cast<int64_t>(datum.tokens.size());
  }
  batch.k = data[0].k;
  return batch;
}

TEST(PackTest, EqualBeginningsShareRowsUntilATokenOrATargetDiffers) {
  const std::vector<TrainDatum> data = {
      Datum({1, 2, 3, 4}, {2, 3, 4, 5}), Datum({1, 2, 3, 9}, {2, 3, 9, 5}),
      Datum({1, 2}, {2, 3}), Datum({7, 2}, {2, 3})};
  const PackedInputs packed = Pack(data, All(data));
  // The second datum's third token is the first's, its target is not.
  EXPECT_EQ(packed.row_of,
            (std::vector<int32_t>{0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 6, 7}));
  EXPECT_EQ(packed.token_of, (std::vector<int32_t>{0, 1, 2, 3, 6, 7, 10, 11}));
  EXPECT_EQ(packed.tokens, (std::vector<int32_t>{1, 2, 3, 4, 3, 9, 7, 2}));
  EXPECT_EQ(packed.positions, (std::vector<int32_t>{0, 1, 2, 3, 2, 3, 0, 1}));
  EXPECT_EQ(packed.targets, (std::vector<int32_t>{2, 3, 4, 5, 9, 5, 2, 3}));
  EXPECT_EQ(packed.cu_seqlens, (std::vector<int32_t>{0, 4, 8, 10, 12}));
  EXPECT_EQ(packed.num_tokens(), 12);
  EXPECT_EQ(packed.num_rows(), 8);
}

TEST(PackTest, TheSameTokenAfterAnotherBeginningIsAnotherRow) {
  const std::vector<TrainDatum> data = {Datum({1, 5, 5}, {5, 5, 5}),
                                        Datum({2, 5, 5}, {5, 5, 5}),
                                        Datum({2, 5, 5}, {5, 5, 5})};
  EXPECT_EQ(Pack(data, All(data)).row_of,
            (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 3, 4, 5}));
}

TEST(PackTest, AllTargetsOfATokenCount) {
  const std::vector<TrainDatum> data = {Datum({1, 2}, {3, 4, 5, 6}, 2),
                                        Datum({1, 2}, {3, 4, 5, 7}, 2)};
  const PackedInputs packed = Pack(data, All(data));
  EXPECT_EQ(packed.row_of, (std::vector<int32_t>{0, 1, 0, 2}));
  EXPECT_EQ(packed.OfTokens(std::vector<float>{1, 2, 3, 4, 5, 6}, 2),
            (std::vector<float>{1, 2, 3, 4, 1, 2, 5, 6}));
  EXPECT_EQ(packed.SumOfRows({1, 2, 3, 4, 10, 20, 30, 40}),
            (std::vector<float>{11, 22, 3, 4, 30, 40}));
}

TEST(PackTest, LittleInCommonIsNotWorthTheCopies) {
  std::vector<TrainDatum> data(2);
  for (int32_t i = 0; i < 2; ++i) {
    for (int32_t t = 0; t < 20; ++t) {
      data[static_cast<size_t>(i)].tokens.push_back(t == 0 ? 1 : 100 * i + t);
      data[static_cast<size_t>(i)].targets.push_back(t);
    }
  }
  const PackedInputs packed = Pack(data, All(data));
  EXPECT_FALSE(packed.shares_rows());
  EXPECT_EQ(packed.num_rows(), 40);
  EXPECT_EQ(packed.positions[20], 0);
}

TEST(PackTest, ALoneDatumSharesNothing) {
  const std::vector<TrainDatum> data = {Datum({1, 1}, {1, 1})};
  EXPECT_FALSE(Pack(data, All(data)).shares_rows());
}

}  // namespace
}  // namespace gradwire
