// SPDX-License-Identifier: Apache-2.0
#include "trainer/rank_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace gradwire {
namespace {

std::vector<double> Loads(const std::vector<int64_t>& tokens, double quadratic,
                          const std::vector<int>& rank_of, int world) {
  std::vector<double> loads(static_cast<size_t>(world), 0.0);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double n = static_cast<double>(tokens[i]);
    loads[static_cast<size_t>(rank_of[i])] += n + quadratic * n * n;
  }
  return loads;
}

TEST(AssignRanksTest, OneRankHasAll) {
  EXPECT_EQ(AssignRanks({5, 1, 9}, 0.1, 1), (std::vector<int>{0, 0, 0}));
  EXPECT_TRUE(AssignRanks({}, 0.1, 3).empty());
}

TEST(AssignRanksTest, EqualDatumsGoRound) {
  EXPECT_EQ(AssignRanks({4, 4, 4, 4, 4}, 0, 2),
            (std::vector<int>{0, 1, 0, 1, 0}));
}

TEST(AssignRanksTest, FewerDatumsThanRanks) {
  EXPECT_EQ(AssignRanks({3, 8}, 0, 4), (std::vector<int>{1, 0}));
}

// A long sequence costs more than as many tokens in short ones.
TEST(AssignRanksTest, CountsAttention) {
  const std::vector<int64_t> tokens = {100, 25, 25, 25, 25, 25, 25};
  const std::vector<int> linear = AssignRanks(tokens, 0, 2);
  EXPECT_EQ(std::count(linear.begin(), linear.end(), linear[0]), 2);
  const std::vector<int> squared = AssignRanks(tokens, 1, 2);
  EXPECT_EQ(std::count(squared.begin(), squared.end(), squared[0]), 1);
}

// No rank has more than the even share and one datum more: what the greedy
// rule promises.
TEST(AssignRanksTest, IsBalanced) {
  std::mt19937 random(1);
  std::lognormal_distribution<double> lengths(5, 1);
  for (const int world : {2, 3, 4, 7, 64}) {
    for (const double quadratic : {0.0, 1e-4, 1e-2}) {
      std::vector<int64_t> tokens(300);
      for (int64_t& n : tokens) {
        n = std::clamp<int64_t>(std::llround(lengths(random)), 1, 8192);
      }
      const auto rank_of = AssignRanks(tokens, quadratic, world);
      const auto loads = Loads(tokens, quadratic, rank_of, world);
      double total = 0;
      for (const double load : loads) total += load;
      const double longest =
          static_cast<double>(*std::max_element(tokens.begin(), tokens.end()));
      EXPECT_LE(*std::max_element(loads.begin(), loads.end()),
                total / world + longest + quadratic * longest * longest);
      EXPECT_GT(*std::min_element(loads.begin(), loads.end()), 0);
      EXPECT_EQ(rank_of, AssignRanks(tokens, quadratic, world));
    }
  }
}

// Against a count of the multiplications, term by term.
TEST(QuadraticCostTest, IsAttentionOverProducts) {
  ModelConfig config;
  config.vocab = 1000;
  config.hidden = 64;
  config.ffn = 160;
  config.layers = 3;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 16;
  const int64_t block = config.hidden * config.QkvWidth() +
                        config.AttentionWidth() * config.hidden +
                        3 * config.hidden * config.ffn;
  const int64_t head = config.vocab * config.hidden;
  const double n = 512;
  const double products =
      6.0 * static_cast<double>(config.layers * block + head) * n;
  const double attention = static_cast<double>(config.layers) * 6 * 2 *
                           static_cast<double>(config.AttentionWidth()) * n *
                           n / 2;
  const double expected = attention / products / n;
  EXPECT_NEAR(QuadraticCost(config, config.layers * block + 2 * head), expected,
              1e-12);
  config.tied_embeddings = true;
  EXPECT_NEAR(QuadraticCost(config, config.layers * block + head), expected,
              1e-12);
}

}  // namespace
}  // namespace gradwire
