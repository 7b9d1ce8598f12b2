// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/chain_policy.h"

#include <gtest/gtest.h>

namespace gradwire {
namespace {

TEST(ChainPolicyTest, EndsByLengthAndBySize) {
  EXPECT_EQ(DecideNextSnapshot({1000, 0, 0}), NextSnapshot::kDelta);
  EXPECT_EQ(DecideNextSnapshot({1000, 500, 24}), NextSnapshot::kDelta);
  EXPECT_EQ(DecideNextSnapshot({1000, 10, 25}), NextSnapshot::kFullChainLong);
  EXPECT_EQ(DecideNextSnapshot({1000, 501, 3}), NextSnapshot::kFullChainLarge);
}

}  // namespace
}  // namespace gradwire
