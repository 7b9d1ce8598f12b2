// SPDX-License-Identifier: Apache-2.0
// Ranks that are threads, on the emulator.
#include "sharding/nccl/replicated_nccl.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/check.h"
#include "base/error.h"
#include "sharding/conformance.h"
#include "sharding/gloo/address_board.h"
#include "sharding/nccl/nccl_collectives.h"

namespace gradwire {
namespace {

// Of a sum: these tests' go in several pieces, and so do the suite's large
// ones.
constexpr int64_t kSumBytes = 64 * 4;
constexpr int64_t kSuiteSumBytes = 4096 * 4;

const std::shared_ptr<CudaDevice>& TheDevice() {
  static const auto* const device = [] {
    auto made = CudaDevice::Create(0);
    GW_CHECK(made.ok());
    return new std::shared_ptr<CudaDevice>(*std::move(made));
  }();
  return *device;
}

// Ranks in the order of groups, each of `shards`.
std::vector<std::unique_ptr<Collectives>> NewRanks(
    int shards, int groups, absl::Duration timeout,
    int64_t sum_bytes = kSumBytes) {
  std::vector<std::unique_ptr<AddressBoard>> within, across;
  for (int g = 0; g < groups; ++g) {
    within.push_back(std::make_unique<AddressBoard>(shards));
  }
  for (int s = 0; s < shards; ++s) {
    across.push_back(std::make_unique<AddressBoard>(groups));
  }
  std::vector<std::unique_ptr<Collectives>> ranks(
      static_cast<size_t>(shards * groups));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < shards * groups; ++rank) {
    threads.emplace_back([&, rank] {
      const int s = rank % shards, g = rank / shards;
      auto in_group = NewNcclCollectives(
          *TheDevice(),
          {.control = {.rank = s, .world = shards, .timeout = timeout},
           .staging_bytes = 1 << 20},
          within[static_cast<size_t>(g)]->ForRank(s));
      GW_CHECK(in_group.ok());
      auto of_groups = NewNcclCollectives(
          *TheDevice(),
          {.control = {.rank = g, .world = groups, .timeout = timeout},
           .staging_bytes = 1 << 20},
          across[static_cast<size_t>(s)]->ForRank(g));
      GW_CHECK(of_groups.ok());
      auto made = NewReplicatedNcclCollectives(
          *TheDevice(), *std::move(in_group), *std::move(of_groups), sum_bytes);
      GW_CHECK(made.ok());
      ranks[static_cast<size_t>(rank)] = *std::move(made);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return ranks;
}

// Of one group they are that group's collectives.
std::vector<CollectivesBackend> OfOneGroup() {
  std::vector<CollectivesBackend> backends = ForEveryWorld(
      [](int world, absl::Duration timeout) {
        return NewRanks(world, 1, timeout, kSuiteSumBytes);
      },
      TheDevice());
  std::erase_if(backends,
                [](const auto& backend) { return backend.world > 2; });
  return backends;
}

INSTANTIATE_TEST_SUITE_P(ReplicatedNccl, CollectivesConformanceTest,
                         testing::ValuesIn(OfOneGroup()), BackendName);

void OnAll(const std::vector<std::unique_ptr<Collectives>>& ranks,
           const std::function<void(int, RankThread&)>& body) {
  std::vector<std::thread> threads;
  for (size_t r = 0; r < ranks.size(); ++r) {
    threads.emplace_back([&, r] {
      RankThread rank(*ranks[r], *TheDevice());
      body(static_cast<int>(r), rank);
      // The others are not to wait for one that has given up.
      if (testing::Test::HasFailure()) {
        rank.group.Abort(absl::CancelledError("a rank's check has failed"));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Whole numbers: their sums are exact.
float ValueOf(int rank, int64_t i) {
  return static_cast<float>((i * 31 + rank * 17) % 1009);
}

TEST(ReplicatedNcclTest, SumsOverAllGroupsInPieces) {
  constexpr int kShards = 2, kGroups = 2;
  for (const int64_t n : {1, 63, 64, 65, 300}) {
    const int64_t stride = n + 7;
    const int64_t size = (kShards - 1) * stride + n;
    const auto ranks = NewRanks(kShards, kGroups, absl::Seconds(100));
    OnAll(ranks, [&](int r, RankThread& rank) {
      std::vector<float> values;
      for (int64_t i = 0; i < size; ++i) values.push_back(ValueOf(r, i));
      const auto full = rank.Put(values);
      const auto shard =
          rank.Put(std::vector<float>(static_cast<size_t>(n), 5.0f));
      const auto sum_at = [&](int64_t i) {
        float sum = 0;
        for (int other = 0; other < kShards * kGroups; ++other) {
          sum += ValueOf(other, r % kShards * stride + i);
        }
        return sum;
      };
      // The second is added to what the first has left.
      for (const float times : {1.0f, 2.0f}) {
        ASSERT_TRUE(rank.Wait(rank.group.ReduceScatterParts(
                                  rank.stream, full.tensor(), stride,
                                  shard.tensor(), true))
                        .ok());
        const std::vector<float> got = shard.Read(rank.stream);
        for (int64_t i = 0; i < n; ++i) {
          ASSERT_EQ(got[static_cast<size_t>(i)], 5 + times * sum_at(i)) << i;
        }
      }
      ASSERT_TRUE(rank.Wait(rank.group.ReduceScatterParts(
                                rank.stream, full.tensor(), stride,
                                shard.tensor(), false))
                      .ok());
      const std::vector<float> got = shard.Read(rank.stream);
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(got[static_cast<size_t>(i)], sum_at(i)) << i;
      }
      // What was read is as it was.
      EXPECT_EQ(full.Read(rank.stream), values);
    });
  }
}

TEST(ReplicatedNcclTest, GathersWithinAGroup) {
  const auto ranks = NewRanks(2, 2, absl::Seconds(100));
  OnAll(ranks, [](int r, RankThread& rank) {
    EXPECT_EQ(rank.rank(), r % 2);
    EXPECT_EQ(rank.world(), 2);
    const auto own = rank.Put(std::vector<float>{static_cast<float>(r)});
    const auto all = rank.Put(std::vector<float>(2));
    ASSERT_TRUE(
        rank.Wait(rank.group.AllGather(rank.stream, own.tensor(), all.tensor()))
            .ok());
    const auto first = static_cast<float>(r / 2 * 2);
    EXPECT_EQ(all.Read(rank.stream), (std::vector<float>{first, first + 1}));
  });
}

// Tickets of long ago, waited for by a stream that has waited for nothing.
TEST(ReplicatedNcclTest, ATicketOfLongAgoIsStillWaitedFor) {
  const auto ranks = NewRanks(2, 2, absl::Seconds(100));
  OnAll(ranks, [](int r, RankThread& rank) {
    constexpr int kRounds = 150;
    std::vector<OnDevice<float>> shards;
    const auto full = rank.Put(std::vector<float>(200, 1.0f));
    std::vector<Collectives::Ticket> tickets;
    for (int i = 0; i < kRounds; ++i) {
      shards.push_back(rank.Put(std::vector<float>(100)));
    }
    for (int i = 0; i < kRounds; ++i) {
      tickets.push_back(rank.group.ReduceScatter(
          rank.stream, full.tensor(), shards[static_cast<size_t>(i)].tensor(),
          i % 3 != 0));
    }
    for (const int i : {0, 1, 70, kRounds - 1}) {
      const auto at = static_cast<size_t>(i);
      RankThread other(rank.group, rank.device);
      ASSERT_TRUE(rank.group.Wait(other.stream, tickets[at]).ok());
      EXPECT_EQ(shards[at].Read(other.stream), std::vector<float>(100, 4.0f))
          << i;
    }
    ASSERT_TRUE(rank.Wait(tickets.back()).ok()) << r;
  });
}

// Collectives are in order: with the last one all are done. Sums that are added
// to one shard follow each other, also in several pieces.
TEST(ReplicatedNcclTest, ATicketCoversAllBeforeIt) {
  const auto ranks = NewRanks(2, 2, absl::Seconds(100));
  OnAll(ranks, [](int, RankThread& rank) {
    constexpr int64_t n = 150;
    const auto full = rank.Put(std::vector<float>(2 * n, 1.0f));
    const auto all = rank.Put(std::vector<float>(2));
    const auto one = rank.Put(std::vector<float>{1.0f});
    for (int round = 0; round < 20; ++round) {
      const auto shard = rank.Put(std::vector<float>(n, -1.0f));
      rank.group.ReduceScatter(rank.stream, full.tensor(), shard.tensor(),
                               false);
      for (int i = 0; i < 5; ++i) {
        rank.group.ReduceScatter(rank.stream, full.tensor(), shard.tensor(),
                                 true);
      }
      const auto last =
          rank.group.AllGather(rank.stream, one.tensor(), all.tensor());
      ASSERT_TRUE(rank.group.Wait(rank.stream, last).ok());
      EXPECT_EQ(shard.Read(rank.stream), std::vector<float>(n, 24.0f));
    }
  });
}

// When a rank has the error, nothing writes to what it gave any more, and the
// group is gone within a moment, though ranks of others never come.
TEST(ReplicatedNcclTest, MemoryIsLeftAloneAfterAFailure) {
  for (const bool finish : {true, false}) {
    auto ranks = NewRanks(2, 2, absl::Seconds(100));
    const absl::Time begin = absl::Now();
    std::latch queued(2);
    // Only one group comes, so its sums wait for the other's.
    std::vector<std::thread> threads;
    for (int r : {0, 1}) {
      threads.emplace_back([&, r] {
        RankThread rank(*ranks[static_cast<size_t>(r)], *TheDevice());
        const auto full = rank.Put(std::vector<float>(600, 1.0f));
        const auto shard = rank.Put(std::vector<float>(300, 7.0f));
        const auto ticket = rank.group.ReduceScatter(rank.stream, full.tensor(),
                                                     shard.tensor(), true);
        if (finish) {
          EXPECT_TRUE(rank.group.Wait(rank.stream, ticket).ok());
        }
        queued.arrive_and_wait();
        if (r == 1) {
          rank.group.Abort(absl::CancelledError("no more"));
        }
        absl::Status status;
        if (finish) {
          status = rank.stream.Finish();
        } else {
          while (status.ok()) {
            status = rank.group.Wait(rank.stream, ticket);
            absl::SleepFor(absl::Milliseconds(5));
          }
        }
        EXPECT_FALSE(status.ok());
        // By a stream that waits for nothing.
        const RankThread reader(rank.group, *TheDevice());
        const std::vector<float> left = shard.Read(reader.stream);
        absl::SleepFor(absl::Milliseconds(50));
        EXPECT_EQ(shard.Read(reader.stream), left);
      });
    }
    for (std::thread& thread : threads) thread.join();
    ranks.clear();
    EXPECT_LT(absl::Now() - begin, absl::Seconds(50));
  }
}

// A stream that asks of a sum which is done, while the lane's next one stands
// still and the groups are being ended.
TEST(ReplicatedNcclTest, AFailureIsSeenToItsEndBesideWhatIsDone) {
  for (int round = 0; round < 5; ++round) {
    auto ranks = NewRanks(2, 2, absl::Seconds(100));
    const absl::Time begin = absl::Now();
    std::latch queued(2);
    OnAll(ranks, [&](int r, RankThread& rank) {
      const auto full = rank.Put(std::vector<float>(600, 1.0f));
      const auto shard = rank.Put(std::vector<float>(300, 7.0f));
      const auto sum = [&] {
        return rank.group.ReduceScatter(rank.stream, full.tensor(),
                                        shard.tensor(), true);
      };
      const auto done = sum();
      ASSERT_TRUE(rank.Wait(done).ok());
      if (r >= 2) return;  // the next one waits for these
      const auto stuck = sum();
      RankThread other(rank.group, *TheDevice());
      EXPECT_TRUE(rank.group.Wait(other.stream, done).ok());
      queued.arrive_and_wait();
      if (r == 1) rank.group.Abort(absl::CancelledError("no more"));
      absl::Status status;
      while (status.ok()) {
        (void)other.stream.Finish();
        status = rank.group.Wait(other.stream, stuck);
        if (status.ok()) absl::SleepFor(absl::Milliseconds(1));
        if (absl::Now() - begin > absl::Seconds(50)) break;
      }
      EXPECT_FALSE(status.ok());
    });
    ranks.clear();
    EXPECT_LT(absl::Now() - begin, absl::Seconds(50));
  }
}

TEST(ReplicatedNcclTest, ARankThatLeavesWithWorkQueuedGoesAtOnce) {
  auto ranks = NewRanks(2, 2, absl::Seconds(100));
  const absl::Time begin = absl::Now();
  {
    RankThread rank(*ranks[0], *TheDevice());
    const auto full = rank.Put(std::vector<float>(2000, 1.0f));
    const auto shard = rank.Put(std::vector<float>(1000, 7.0f));
    rank.group.ReduceScatter(rank.stream, full.tensor(), shard.tensor(), true);
    ranks[0].reset();
  }
  EXPECT_LT(absl::Now() - begin, absl::Seconds(50));
}

// What a stream waits for is counted, not what lanes do.
TEST(ReplicatedNcclTest, StatisticsAreOfWhoWaits) {
  const auto ranks = NewRanks(2, 2, absl::Seconds(100));
  OnAll(ranks, [](int r, RankThread& rank) {
    const auto full = rank.Put(std::vector<float>(600, 1.0f));
    const auto shard = rank.Put(std::vector<float>(300, 7.0f));
    constexpr int kRounds = 5;
    double least = 1, before = 0;
    for (int round = 1; round <= kRounds; ++round) {
      // One group comes late, and nobody waits for it: on a busy machine, in
      // one of the rounds.
      if (r < 2) absl::SleepFor(absl::Milliseconds(100));
      const auto ticket = rank.group.ReduceScatter(rank.stream, full.tensor(),
                                                   shard.tensor(), true);
      absl::SleepFor(absl::Milliseconds(300));
      ASSERT_TRUE(rank.Wait(ticket).ok());
      const Collectives::Statistics statistics = rank.group.statistics();
      EXPECT_EQ(statistics.collectives, round);
      EXPECT_GT(statistics.busy_seconds, 0);
      least = std::min(least, statistics.wait_seconds - before);
      before = statistics.wait_seconds;
    }
    EXPECT_LT(least, 0.05);
  });
}

TEST(ReplicatedNcclTest, AFailureInOneGroupEndsAll) {
  const auto ranks = NewRanks(2, 2, absl::Seconds(100));
  OnAll(ranks, [&](int r, RankThread& rank) {
    const auto full = rank.Put(std::vector<float>(200, 1.0f));
    const auto shard = rank.Put(std::vector<float>(100));
    // It has its reasons, and comes to nothing any more.
    if (r == 3) {
      rank.group.Abort(absl::CancelledError("no more"));
      EXPECT_FALSE(
          rank.Wait(rank.group.ReduceScatter(rank.stream, full.tensor(),
                                             shard.tensor(), true))
              .ok());
      return;
    }
    // Rank 0 shares no group with it: it learns of it by those that do.
    absl::Status status;
    for (int i = 0; i < 1000 && status.ok(); ++i) {
      status = rank.Wait(rank.group.ReduceScatter(rank.stream, full.tensor(),
                                                  shard.tensor(), true));
    }
    const auto detail = GetErrorDetail(status);
    ASSERT_TRUE(detail.has_value()) << r << " " << status;
    EXPECT_EQ(detail->reason, "COLLECTIVE_FAILED") << r;
    rank.group.Abort(status);
  });
}

}  // namespace
}  // namespace gradwire
