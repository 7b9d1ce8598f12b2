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
void GatherEach(RankThread& t) {
  for (const int64_t n : {0, 1, 5, 4096, 20011}) {
    const auto shard = t.Put(Values<T>(t.rank(), n, 1));
    const auto full = t.Put(std::vector<T>(static_cast<size_t>(n * t.world())));
    ASSERT_TRUE(
        t.Wait(t.group.AllGather(t.stream, shard.tensor(), full.tensor()))
            .ok());
    std::vector<T> want;
    for (int rank = 0; rank < t.world(); ++rank) {
      const std::vector<T> part = Values<T>(rank, n, 1);
      want.insert(want.end(), part.begin(), part.end());
    }
    ExpectSame(full.Read(t.stream), want);
  }
}

TEST_P(CollectivesConformanceTest, AllGatherPutsShardsBehindEachOther) {
  RunAll([](RankThread& t) {
    GatherEach<float>(t);
    GatherEach<double>(t);
    GatherEach<BFloat16>(t);
    GatherEach<int32_t>(t);
    GatherEach<int16_t>(t);
    GatherEach<int64_t>(t);
  });
}

TEST_P(CollectivesConformanceTest, AllGatherTakesAShardInItsPlace) {
  RunAll([](RankThread& t) {
    const int64_t n = 5000;
    std::vector<float> before(static_cast<size_t>(n * t.world()), -1.0f);
    const std::vector<float> mine = Values<float>(t.rank(), n, 2);
    std::copy(mine.begin(), mine.end(), before.begin() + t.rank() * n);
    const auto full = t.Put(before);
    const Tensor all = full.tensor();
    const Tensor shard = all.Rows(t.rank() * n, (t.rank() + 1) * n);
    ASSERT_TRUE(t.Wait(t.group.AllGather(t.stream, shard, all)).ok());
    std::vector<float> want;
    for (int rank = 0; rank < t.world(); ++rank) {
      const std::vector<float> part = Values<float>(rank, n, 2);
      want.insert(want.end(), part.begin(), part.end());
    }
    ExpectSame(full.Read(t.stream), want);
  });
}

TEST_P(CollectivesConformanceTest, ReduceScatterAddsInRankOrder) {
  RunAll([](RankThread& t) {
    for (const int64_t n : Sizes(t.world())) {
      SCOPED_TRACE(n);
      const int64_t begin = t.rank() * n;
      const std::vector<float> before =
          Values<float>(t.rank(), n * t.world(), 3);
      const auto full = t.Put(before);
      auto shard = t.Put(std::vector<float>(static_cast<size_t>(n), NAN));
      ASSERT_TRUE(t.Wait(t.group.ReduceScatter(t.stream, full.tensor(),
                                               shard.tensor(), false))
                      .ok());
      const std::vector<float> sum =
          SumOfValues<float>(t.world(), begin, begin + n, 3);
      ExpectSame(shard.Read(t.stream), sum);
      ExpectSame(full.Read(t.stream), before);

      std::vector<float> want = Values<float>(t.rank(), n, 4);
      shard.Write(t.stream, want);
      for (size_t i = 0; i < want.size(); ++i) want[i] += sum[i];
      ASSERT_TRUE(t.Wait(t.group.ReduceScatter(t.stream, full.tensor(),
                                               shard.tensor(), true))
                      .ok());
      ExpectSame(shard.Read(t.stream), want);
    }
  });
}

TEST_P(CollectivesConformanceTest, ReduceScatterTakesPartsThatLieApart) {
  RunAll([](RankThread& t) {
    for (const int64_t n : Sizes(t.world())) {
      SCOPED_TRACE(n);
      for (const int64_t gap : {0, 1, 4096}) {
        const int64_t stride = n + gap;
        const int64_t size = (t.world() - 1) * stride + n;
        const int64_t begin = t.rank() * stride;
        const std::vector<float> before = Values<float>(t.rank(), size, 8);
        const auto full = t.Put(before);
        std::vector<float> want = Values<float>(t.rank(), n, 9);
        const auto shard = t.Put(want);
        ASSERT_TRUE(
            t.Wait(t.group.ReduceScatterParts(t.stream, full.tensor(), stride,
                                              shard.tensor(), true))
                .ok());
        const std::vector<float> sum =
            SumOfValues<float>(t.world(), begin, begin + n, 8);
        for (size_t i = 0; i < want.size(); ++i) want[i] += sum[i];
        ExpectSame(shard.Read(t.stream), want);
        ExpectSame(full.Read(t.stream), before);
      }
    }
  });
}

template <typename T>
void ReduceEach(RankThread& t) {
  for (const int64_t n : Sizes(t.world())) {
    SCOPED_TRACE(n);
    const auto values = t.Put(Values<T>(t.rank(), n, 5));
    ASSERT_TRUE(t.Wait(t.group.AllReduce(t.stream, values.tensor())).ok());
    ExpectSame(values.Read(t.stream), SumOfValues<T>(t.world(), 0, n, 5));
  }
}

TEST_P(CollectivesConformanceTest, AllReduceAddsInRankOrder) {
  RunAll([](RankThread& t) {
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
void BroadcastEach(RankThread& t) {
  for (int root = 0; root < t.world(); ++root) {
    for (const int64_t n : {0, 1, 77, 70001}) {
      const auto values = t.Put(Values<T>(t.rank(), n, 6));
      ASSERT_TRUE(
          t.Wait(t.group.Broadcast(t.stream, values.tensor(), root)).ok());
      ExpectSame(values.Read(t.stream), Values<T>(root, n, 6));
    }
  }
}

TEST_P(CollectivesConformanceTest, BroadcastGivesTheValuesOfAnyRoot) {
  RunAll([](RankThread& t) {
    BroadcastEach<float>(t);
    BroadcastEach<BFloat16>(t);
    BroadcastEach<int64_t>(t);
  });
}

TEST_P(CollectivesConformanceTest, LargeTensors) {
  if (world() != 2 && world() != 4) GTEST_SKIP() << "for the time it takes";
  RunAll([](RankThread& t) {
    const int64_t n = (int64_t{64} << 20) / 4 / t.world();
    const auto full = t.Put(Values<float>(t.rank(), n * t.world(), 7));
    const auto shard = t.Put(std::vector<float>(static_cast<size_t>(n)));
    const auto reduced =
        t.group.ReduceScatter(t.stream, full.tensor(), shard.tensor(), false);
    ASSERT_TRUE(t.Wait(reduced).ok());
    const auto gathered =
        t.group.AllGather(t.stream, shard.tensor(), full.tensor());
    ASSERT_TRUE(t.Wait(gathered).ok());
    ExpectSame(full.Read(t.stream),
               SumOfValues<float>(t.world(), 0, n * t.world(), 7));
  });
}

// A collective that is queued, what it writes, and how to check that.
struct Queued {
  OnDevice<float> from, to;
  std::vector<float> want;
  Collectives::Ticket ticket = 0;
};

void Queue(RankThread& t, int kind, int64_t n, uint64_t seed, Queued& q) {
  const int world = t.world(), rank = t.rank();
  switch (kind) {
    case 0:
      q.from = t.Put(Values<float>(rank, n, seed));
      q.to = t.Put(std::vector<float>(static_cast<size_t>(n * world)));
      for (int r = 0; r < world; ++r) {
        const std::vector<float> part = Values<float>(r, n, seed);
        q.want.insert(q.want.end(), part.begin(), part.end());
      }
      q.ticket = t.group.AllGather(t.stream, q.from.tensor(), q.to.tensor());
      break;
    case 1:
      q.from = t.Put(Values<float>(rank, n * world, seed));
      q.to = t.Put(std::vector<float>(static_cast<size_t>(n)));
      q.want = SumOfValues<float>(world, rank * n, (rank + 1) * n, seed);
      q.ticket = t.group.ReduceScatter(t.stream, q.from.tensor(), q.to.tensor(),
                                       false);
      break;
    case 2:
      q.to = t.Put(Values<float>(rank, n, seed));
      q.want = SumOfValues<float>(world, 0, n, seed);
      q.ticket = t.group.AllReduce(t.stream, q.to.tensor());
      break;
    default: {
      const int root = static_cast<int>(seed % static_cast<uint64_t>(world));
      q.to = t.Put(Values<float>(rank, n, seed));
      q.want = Values<float>(root, n, seed);
      q.ticket = t.group.Broadcast(t.stream, q.to.tensor(), root);
    }
  }
}

TEST_P(CollectivesConformanceTest, ManyQueueUpAndAreWaitedForInAnyOrder) {
  RunAll([](RankThread& t) {
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
      ExpectSame(queue[i].to.Read(t.stream), queue[i].want);
    }
    // Once more costs nothing.
    EXPECT_TRUE(t.Wait(queue[0].ticket).ok());
  });
}

TEST_P(CollectivesConformanceTest, RandomSequences) {
  const Group group = NewGroup();
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    Run(group, world(), [&](RankThread& t) {
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
      for (const Queued& q : queue) ExpectSame(q.to.Read(t.stream), q.want);
    });
  }
}

TEST_P(CollectivesConformanceTest, AFailedStreamTakesPartAllTheSame) {
  RunAll([](RankThread& t) {
    const auto values = t.Put(Values<float>(t.rank(), 100, 9));
    const absl::Status failure = absl::InternalError("an op failed");
    if (t.rank() == 0) t.stream.Fail(failure);
    const auto ticket = t.group.AllReduce(t.stream, values.tensor());
    ASSERT_TRUE(t.group.Wait(t.stream, ticket).ok());
    EXPECT_EQ(t.stream.Finish(), t.rank() == 0 ? failure : absl::OkStatus());
    ExpectSame(values.Read(t.stream), SumOfValues<float>(t.world(), 0, 100, 9));
  });
}

// Nobody waits but the stream.
TEST_P(CollectivesConformanceTest, CollectivesKeepTheOrderOfTheStream) {
  RunAll([](RankThread& t) {
    const int64_t n = 1 << 20;
    const auto values = t.Put(std::vector<float>(static_cast<size_t>(n)));
    std::vector<float> sum(static_cast<size_t>(n));
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      const std::vector<float> mine = Values<float>(t.rank(), n, seed);
      t.device.CopyFromHost(t.stream, mine.data(), values.tensor());
      const auto ticket = t.group.AllReduce(t.stream, values.tensor());
      ASSERT_TRUE(t.group.Wait(t.stream, ticket).ok());
      t.device.CopyToHost(t.stream, values.tensor(), sum.data());
      ASSERT_TRUE(t.stream.Finish().ok());
      ExpectSame(sum, SumOfValues<float>(t.world(), 0, n, seed));
    }
  });
}

TEST_P(CollectivesConformanceTest, StatisticsCount) {
  RunAll([](RankThread& t) {
    const Collectives::Statistics before = t.group.statistics();
    EXPECT_EQ(before.bytes_sent, 0);
    EXPECT_EQ(before.collectives, 0);
    const auto shard = t.Put(std::vector<float>(1000));
    const auto full = t.Put(std::vector<float>(1000 * t.world()));
    for (int i = 0; i < 3; ++i) {
      ASSERT_TRUE(
          t.Wait(t.group.AllGather(t.stream, shard.tensor(), full.tensor()))
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
