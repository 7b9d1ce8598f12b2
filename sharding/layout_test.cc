// SPDX-License-Identifier: Apache-2.0
#include "sharding/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

namespace gradwire {
namespace {

constexpr int kWorlds[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 1024};

// Unit sizes, in multiples of kMinAlignment.
std::vector<std::vector<int64_t>> UnitTables() {
  std::vector<std::vector<int64_t>> tables = {
      {1}, {2, 1}, {1, 1, 1, 1}, {100000, 3, 70001, 1}, {1 << 20, 1 << 14}};
  std::mt19937 random(5);
  for (int i = 0; i < 20; ++i) {
    std::vector<int64_t> sizes(1 + random() % 12);
    // Of all magnitudes, and sometimes nothing.
    for (int64_t& size : sizes) size = random() % (1u << (random() % 22));
    tables.push_back(sizes);
  }
  return tables;
}

ShardLayout MakeLayout(const std::vector<int64_t>& sizes, int world) {
  std::vector<int64_t> begins;
  int64_t end = 0;
  for (const int64_t size : sizes) {
    begins.push_back(end);
    end += size * ShardLayout::kMinAlignment;
  }
  return ShardLayout(begins, end, world);
}

template <typename Check>
void ForEveryLayout(Check check) {
  for (const std::vector<int64_t>& sizes : UnitTables()) {
    for (const int world : kWorlds) {
      SCOPED_TRACE(testing::PrintToString(sizes) + " on " +
                   std::to_string(world));
      check(MakeLayout(sizes, world));
    }
  }
}

TEST(ShardLayoutTest, ShardsCoverTheirUnitAndFollowEachOther) {
  ForEveryLayout([](const ShardLayout& layout) {
    int64_t flat = 0, offset = 0;
    for (int i = 0; i < layout.num_units(); ++i) {
      const ShardUnit& unit = layout.unit(i);
      EXPECT_EQ(unit.begin, flat);
      EXPECT_EQ(unit.offset, offset);
      EXPECT_EQ(layout.PaddedSize(i), unit.shard * layout.world());
      EXPECT_GE(layout.PaddedSize(i), unit.size());
      flat = unit.end;
      offset += unit.shard;
    }
    EXPECT_EQ(layout.num_elements(), flat);
    EXPECT_EQ(layout.shard_elements(), offset);
  });
}

TEST(ShardLayoutTest, AlignmentIsTheLargestOfLittlePadding) {
  ForEveryLayout([](const ShardLayout& layout) {
    const int world = layout.world();
    for (int i = 0; i < layout.num_units(); ++i) {
      const ShardUnit& unit = layout.unit(i);
      EXPECT_EQ(unit.shard % ShardLayout::kMinAlignment, 0);
      const int64_t padding = layout.PaddedSize(i) - unit.size();
      // The least that the smallest alignment leaves, or below the limit.
      EXPECT_TRUE(padding < ShardLayout::kMinAlignment * world ||
                  padding < unit.size() / 64.0)
          << padding << " of " << unit.size();
      if (world == 1) continue;
      for (int64_t a = ShardLayout::kMaxAlignment;
           a > ShardLayout::kMinAlignment; a /= 2) {
        const int64_t shards = (unit.size() + a * world - 1) / (a * world);
        const bool little =
            shards * a * world - unit.size() < unit.size() / 64.0;
        if (little) {
          EXPECT_EQ(unit.shard, shards * a);
          break;
        }
      }
    }
  });
}

TEST(ShardLayoutTest, OneRankHoldsTheFlatVectorItself) {
  for (const std::vector<int64_t>& sizes : UnitTables()) {
    const ShardLayout layout = MakeLayout(sizes, 1);
    EXPECT_EQ(layout.shard_elements(), layout.num_elements());
    for (int i = 0; i < layout.num_units(); ++i) {
      EXPECT_EQ(layout.unit(i).offset, layout.unit(i).begin);
      EXPECT_EQ(layout.unit(i).shard, layout.unit(i).size());
    }
    const int64_t end = layout.num_elements();
    for (const ShardPiece& piece : layout.Pieces(0, end)) {
      EXPECT_EQ(piece.offset, piece.begin);
    }
  }
}

TEST(ShardLayoutTest, EveryElementHasOneOwner) {
  ForEveryLayout([](const ShardLayout& layout) {
    for (int i = 0; i < layout.num_units(); ++i) {
      int64_t at = layout.unit(i).begin;
      for (int rank = 0; rank < layout.world(); ++rank) {
        const ShardPiece owned = layout.Owned(i, rank);
        EXPECT_EQ(owned.rank, rank);
        EXPECT_EQ(owned.begin, at);
        EXPECT_LE(owned.size(), layout.unit(i).shard);
        EXPECT_EQ(owned.offset, layout.unit(i).offset);
        at = owned.end;
      }
      EXPECT_EQ(at, layout.unit(i).end);
    }
  });
}

// That `pieces` are [begin, end), each within what its rank owns of one unit.
void ExpectCover(const ShardLayout& layout, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (const ShardPiece& piece : layout.Pieces(begin, end)) {
    ASSERT_EQ(piece.begin, at);
    ASSERT_GT(piece.size(), 0);
    const ShardPiece owned =
        layout.Owned(layout.UnitOf(piece.begin), piece.rank);
    ASSERT_GE(piece.begin, owned.begin);
    ASSERT_LE(piece.end, owned.end);
    ASSERT_EQ(piece.offset - owned.offset, piece.begin - owned.begin);
    // As large as it can be.
    ASSERT_EQ(piece.end, std::min(owned.end, end));
    at = piece.end;
  }
  ASSERT_EQ(at, end);
}

TEST(ShardLayoutTest, PiecesCoverARangeOnceAndAgreeWithTheOwners) {
  std::mt19937 random(6);
  ForEveryLayout([&](const ShardLayout& layout) {
    const int64_t n = layout.num_elements();
    ExpectCover(layout, 0, n);
    ExpectCover(layout, n, n);
    if (n == 0) return;
    for (int i = 0; i < 10; ++i) {
      const auto [begin, end] =
          std::minmax({static_cast<int64_t>(random()) % (n + 1),
                       static_cast<int64_t>(random()) % (n + 1)});
      ExpectCover(layout, begin, end);
    }
  });
}

TEST(ShardLayoutTest, AUnitOfOneShardLeavesTheOtherRanksNothing) {
  const ShardLayout layout({0, 64}, 64 + 640, 4);
  EXPECT_EQ(layout.Owned(0, 0).size(), 64);
  for (int rank = 1; rank < 4; ++rank) {
    EXPECT_EQ(layout.Owned(0, rank).size(), 0);
  }
  EXPECT_EQ(layout.PaddedSize(0), 4 * 64);
  // 640 on four: 192 each, and the last holds what is left.
  EXPECT_EQ(layout.Owned(1, 3).size(), 64);
  EXPECT_EQ(layout.Owned(1, 3).offset, 64);
}

TEST(ShardLayoutTest, LargeUnitsAreSharedOutInLargeSteps) {
  const int64_t size = int64_t{1} << 30;
  const ShardLayout layout({0}, size, 3);
  EXPECT_EQ(layout.unit(0).shard % ShardLayout::kMaxAlignment, 0);
  EXPECT_LT(layout.PaddedSize(0) - size, size / 64);
}

TEST(ShardLayoutDeathTest, AMisalignedTableEndsTheProcess) {
  EXPECT_DEATH(ShardLayout({0, 32}, 64, 2), "kMinAlignment");
  EXPECT_DEATH(ShardLayout({64}, 128, 2), "begins");
}

}  // namespace
}  // namespace gradwire
