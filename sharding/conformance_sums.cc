// SPDX-License-Identifier: Apache-2.0
// The values that collectives leave, bit by bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "sharding/conformance.h"
#include "sharding/conformance_values.h"

namespace gradwire {
namespace {

// Around the sizes at which backends change their ways. Many ranks get fewer,
// for the time it takes.
std::vector<int64_t> Sizes(int world) {
  constexpr int64_t kPiece = 1 << 18;
  if (world > 3) return {0, 1, 3, 64, 8191, kPiece + 1};
  return {0,      1,          3,      64,         1000,          8191,
          100003, kPiece - 1, kPiece, kPiece + 1, 3 * kPiece + 7};
}

template <typename T>
void GatherEach(RankThread t) {
  for (const int64_t n : {0, 1, 5, 4096, 20011}) {
    std::vector<T> shard = Values<T>(t.rank(), n, 1);
    std::vector<T> full(static_cast<size_t>(n * t.world()));
    ASSERT_TRUE(
        t.Wait(t.group.AllGather(t.stream, TensorOf(shard), TensorOf(full)))
            .ok());
    std::vector<T> want;
    for (int rank = 0; rank < t.world(); ++rank) {
      const std::vector<T> part = Values<T>(rank, n, 1);
      want.insert(want.end(), part.begin(), part.end());
    }
    ExpectSame(full, want);
  }
}

TEST_P(CollectivesConformanceTest, AllGatherPutsShardsBehindEachOther) {
  RunAll([](RankThread t) {
    GatherEach<float>(t);
    GatherEach<double>(t);
    GatherEach<BFloat16>(t);
    GatherEach<int32_t>(t);
    GatherEach<int16_t>(t);
    GatherEach<int64_t>(t);
  });
}

TEST_P(CollectivesConformanceTest, AllGatherTakesAShardInItsPlace) {
  RunAll([](RankThread t) {
    const int64_t n = 5000;
    std::vector<float> full(static_cast<size_t>(n * t.world()), -1.0f);
    const std::vector<float> mine = Values<float>(t.rank(), n, 2);
    std::copy(mine.begin(), mine.end(), full.begin() + t.rank() * n);
    const Tensor all = TensorOf(full);
    const Tensor shard = all.Rows(t.rank() * n, (t.rank() + 1) * n);
    ASSERT_TRUE(t.Wait(t.group.AllGather(t.stream, shard, all)).ok());
    std::vector<float> want;
    for (int rank = 0; rank < t.world(); ++rank) {
      const std::vector<float> part = Values<float>(rank, n, 2);
      want.insert(want.end(), part.begin(), part.end());
    }
    ExpectSame(full, want);
  });
}

TEST_P(CollectivesConformanceTest, ReduceScatterAddsInRankOrder) {
  RunAll([](RankThread t) {
    for (const int64_t n : Sizes(t.world())) {
      SCOPED_TRACE(n);
      const int64_t begin = t.rank() * n;
      std::vector<float> full = Values<float>(t.rank(), n * t.world(), 3);
      const std::vector<float> before = full;
      std::vector<float> shard(static_cast<size_t>(n), NAN);
      ASSERT_TRUE(t.Wait(t.group.ReduceScatter(t.stream, TensorOf(full),
                                               TensorOf(shard), false))
                      .ok());
      const std::vector<float> sum =
          SumOfValues<float>(t.world(), begin, begin + n, 3);
      ExpectSame(shard, sum);
      ExpectSame(full, before);

      shard = Values<float>(t.rank(), n, 4);
      std::vector<float> want = shard;
      for (size_t i = 0; i < want.size(); ++i) want[i] += sum[i];
      ASSERT_TRUE(t.Wait(t.group.ReduceScatter(t.stream, TensorOf(full),
                                               TensorOf(shard), true))
                      .ok());
      ExpectSame(shard, want);
    }
  });
}

template <typename T>
void ReduceEach(RankThread t) {
  for (const int64_t n : Sizes(t.world())) {
    SCOPED_TRACE(n);
    std::vector<T> values = Values<T>(t.rank(), n, 5);
    ASSERT_TRUE(t.Wait(t.group.AllReduce(t.stream, TensorOf(values))).ok());
    ExpectSame(values, SumOfValues<T>(t.world(), 0, n, 5));
  }
}

TEST_P(CollectivesConformanceTest, AllReduceAddsInRankOrder) {
  RunAll([](RankThread t) {
    ReduceEach<float>(t);
    ReduceEach<double>(t);
  });
}

// So that the tests above can tell one order from another.
TEST_P(CollectivesConformanceTest, TheOrderOfTheSumShows) {
  if (world() < 3) GTEST_SKIP();
  int64_t differ = 0;
  const std::vector<float> sum = SumOfValues<float>(world(), 0, 1000, 3);
  for (int64_t i = 0; i < 1000; ++i) {
    float total = 0;
    for (int rank = world() - 1; rank >= 0; --rank) {
      total += Values<float>(rank, 1000, 3)[static_cast<size_t>(i)];
    }
    if (total != sum[static_cast<size_t>(i)]) ++differ;
  }
  EXPECT_GT(differ, 100);
}

template <typename T>
void BroadcastEach(RankThread t) {
  for (int root = 0; root < t.world(); ++root) {
    for (const int64_t n : {0, 1, 77, 70001}) {
      std::vector<T> values = Values<T>(t.rank(), n, 6);
      ASSERT_TRUE(
          t.Wait(t.group.Broadcast(t.stream, TensorOf(values), root)).ok());
      ExpectSame(values, Values<T>(root, n, 6));
    }
  }
}

TEST_P(CollectivesConformanceTest, BroadcastGivesTheValuesOfAnyRoot) {
  RunAll([](RankThread t) {
    BroadcastEach<float>(t);
    BroadcastEach<BFloat16>(t);
    BroadcastEach<int64_t>(t);
  });
}

TEST_P(CollectivesConformanceTest, LargeTensors) {
  if (world() != 2 && world() != 4) GTEST_SKIP() << "for the time it takes";
  RunAll([](RankThread t) {
    const int64_t n = (int64_t{64} << 20) / 4 / t.world();
    std::vector<float> full = Values<float>(t.rank(), n * t.world(), 7);
    std::vector<float> shard(static_cast<size_t>(n));
    const auto reduced =
        t.group.ReduceScatter(t.stream, TensorOf(full), TensorOf(shard), false);
    ASSERT_TRUE(t.Wait(reduced).ok());
    const auto gathered =
        t.group.AllGather(t.stream, TensorOf(shard), TensorOf(full));
    ASSERT_TRUE(t.Wait(gathered).ok());
    ExpectSame(full, SumOfValues<float>(t.world(), 0, n * t.world(), 7));
  });
}

// A collective that is queued, what it writes, and how to check that.
struct Queued {
  std::vector<float> from, to;
  std::vector<float> want;
  Collectives::Ticket ticket = 0;
};

void Queue(RankThread t, int kind, int64_t n, uint64_t seed, Queued& q) {
  const int world = t.world(), rank = t.rank();
  switch (kind) {
    case 0:
      q.from = Values<float>(rank, n, seed);
      q.to.resize(static_cast<size_t>(n * world));
      for (int r = 0; r < world; ++r) {
        const std::vector<float> part = Values<float>(r, n, seed);
        q.want.insert(q.want.end(), part.begin(), part.end());
      }
      q.ticket = t.group.AllGather(t.stream, TensorOf(q.from), TensorOf(q.to));
      break;
    case 1:
      q.from = Values<float>(rank, n * world, seed);
      q.to.resize(static_cast<size_t>(n));
      q.want = SumOfValues<float>(world, rank * n, (rank + 1) * n, seed);
      q.ticket = t.group.ReduceScatter(t.stream, TensorOf(q.from),
                                       TensorOf(q.to), false);
      break;
    case 2:
      q.to = Values<float>(rank, n, seed);
      q.want = SumOfValues<float>(world, 0, n, seed);
      q.ticket = t.group.AllReduce(t.stream, TensorOf(q.to));
      break;
    default: {
      const int root = static_cast<int>(seed % static_cast<uint64_t>(world));
      q.to = Values<float>(rank, n, seed);
      q.want = Values<float>(root, n, seed);
      q.ticket = t.group.Broadcast(t.stream, TensorOf(q.to), root);
    }
  }
}

TEST_P(CollectivesConformanceTest, ManyQueueUpAndAreWaitedForInAnyOrder) {
  RunAll([](RankThread t) {
    std::vector<Queued> queue(300);
    Collectives::Ticket last = 0;
    for (size_t i = 0; i < queue.size(); ++i) {
      Queue(t, static_cast<int>(i % 4), static_cast<int64_t>(i * 7 % 101), i,
            queue[i]);
      EXPECT_GT(queue[i].ticket, last);
      last = queue[i].ticket;
    }
    // Each rank in an order of its own.
    std::mt19937 random(static_cast<unsigned>(t.rank()));
    std::vector<size_t> order(queue.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      ASSERT_TRUE(t.Wait(queue[i].ticket).ok());
      ExpectSame(queue[i].to, queue[i].want);
    }
    // Once more costs nothing.
    EXPECT_TRUE(t.Wait(queue[0].ticket).ok());
  });
}

TEST_P(CollectivesConformanceTest, RandomSequences) {
  const Group group = NewGroup();
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    Run(group, world(), [&](RankThread t) {
      std::mt19937 random(static_cast<unsigned>(seed));
      std::vector<Queued> queue(40);
      size_t waited = 0;
      for (size_t i = 0; i < queue.size(); ++i) {
        const int kind = static_cast<int>(random() % 4);
        // Of all magnitudes, and sometimes nothing.
        const int64_t n = random() % (1u << (random() % 17));
        Queue(t, kind, n, seed * 1000 + i, queue[i]);
        if (random() % 3 > 0) continue;
        for (; waited <= i; ++waited) {
          ASSERT_TRUE(t.Wait(queue[waited].ticket).ok());
        }
      }
      ASSERT_TRUE(t.Wait(queue.back().ticket).ok());
      for (const Queued& q : queue) ExpectSame(q.to, q.want);
    });
  }
}

TEST_P(CollectivesConformanceTest, AFailedStreamTakesPartAllTheSame) {
  RunAll([](RankThread t) {
    if (t.rank() == 0) t.stream.Fail(absl::InternalError("an op failed"));
    Queued q;
    Queue(t, 2, 100, 9, q);
    ASSERT_TRUE(t.Wait(q.ticket).ok());
    ExpectSame(q.to, q.want);
    (void)t.stream.Finish();
  });
}

TEST_P(CollectivesConformanceTest, StatisticsCount) {
  RunAll([](RankThread t) {
    const Collectives::Statistics before = t.group.statistics();
    EXPECT_EQ(before.bytes_sent, 0);
    EXPECT_EQ(before.collectives, 0);
    std::vector<float> shard(1000), full(shard.size() * t.world());
    for (int i = 0; i < 3; ++i) {
      ASSERT_TRUE(
          t.Wait(t.group.AllGather(t.stream, TensorOf(shard), TensorOf(full)))
              .ok());
    }
    const Collectives::Statistics after = t.group.statistics();
    EXPECT_EQ(after.bytes_sent, 3 * 4000 * (t.world() - 1));
    EXPECT_EQ(after.collectives, 3);
    EXPECT_GT(after.busy_seconds, 0);
    EXPECT_GE(after.wait_seconds, 0);
  });
}

}  // namespace
}  // namespace gradwire
