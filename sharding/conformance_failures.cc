// SPDX-License-Identifier: Apache-2.0
// What is promised when a rank does not come, aborts or leaves.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "sharding/conformance.h"
#include "sharding/conformance_values.h"

namespace gradwire {
namespace {

// "COLLECTIVE_TIMEOUT rank 2", or the message of a status without a reason.
std::string Summary(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  if (!detail) return std::string(status.message());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(detail->category, ErrorCategory::kServer);
  return detail->reason + " rank " + detail->metadata.at("rank");
}

absl::Status SumUp(RankThread& t, const OnDevice<float>& values) {
  return t.Wait(t.group.AllReduce(t.stream, values.tensor()));
}

std::vector<float> Zeros(size_t n) { return std::vector<float>(n); }

// A guard against hangs, far above what anything here takes.
constexpr absl::Duration kSoon = absl::Seconds(10);

TEST_P(CollectivesConformanceTest, ATimeoutNamesTheRankThatNeverCame) {
  if (world() == 1) GTEST_SKIP();
  const int late = world() - 1;
  // Also the time in which all must have come to make the group.
  const absl::Duration timeout = absl::Milliseconds(2500);
  const Group group = NewGroup(timeout);
  Run(group, late, [&](RankThread& t) {
    const auto values = t.Put(Zeros(100));
    const absl::Status status = SumUp(t, values);
    EXPECT_EQ(Summary(status),
              "COLLECTIVE_TIMEOUT rank " + std::to_string(late));
    EXPECT_EQ(GetErrorDetail(status)->metadata.at("seconds"), "2.5");
    // The same again, at once, whatever is asked for.
    const absl::Time start = absl::Now();
    for (int i = 0; i < 10; ++i) {
      EXPECT_EQ(SumUp(t, values), status);
      EXPECT_EQ(t.Wait(t.group.Broadcast(t.stream, values.tensor(), 0)),
                status);
    }
    EXPECT_LT(absl::Now() - start, timeout);
  });
  // It finds the group ended, for the same reason.
  RankThread last(*group.back(), device());
  EXPECT_EQ(Summary(SumUp(last, last.Put(Zeros(100)))),
            "COLLECTIVE_TIMEOUT rank " + std::to_string(late));
}

TEST_P(CollectivesConformanceTest, AbortEndsABlockedCollective) {
  if (world() == 1) GTEST_SKIP();
  const Group group = NewGroup();
  std::atomic<int> queued{0};
  std::thread aborter([&] {
    while (queued < world() - 1) std::this_thread::yield();
    group[0]->Abort(absl::CancelledError("no more"));
    // The first one stays.
    group[0]->Abort(absl::InternalError("again"));
  });
  Run(group, world() - 1, [&](RankThread& t) {
    const auto values = t.Put(Zeros(100));
    const auto ticket = t.group.AllReduce(t.stream, values.tensor());
    ++queued;
    const absl::Status status = t.Wait(ticket);
    EXPECT_EQ(Summary(status),
              t.rank() == 0 ? "no more" : "COLLECTIVE_FAILED rank 0");
    EXPECT_EQ(SumUp(t, values), status);
  });
  aborter.join();
}

TEST_P(CollectivesConformanceTest, AbortTakesLessThanASecond) {
  if (world() == 1) GTEST_SKIP();
  const Group group = NewGroup();
  RankThread t(*group[0], device());
  // Large, so that the peers stand in the middle of it.
  const auto shard = t.Put(Zeros(1 << 20));
  const auto full = t.Put(Zeros((1 << 20) * static_cast<size_t>(world())));
  const auto ticket =
      t.group.AllGather(t.stream, shard.tensor(), full.tensor());
  const absl::Time start = absl::Now();
  t.group.Abort(absl::CancelledError("no more"));
  EXPECT_EQ(Summary(t.Wait(ticket)), "no more");
  EXPECT_LT(absl::Now() - start, absl::Seconds(1));
}

TEST_P(CollectivesConformanceTest, AbortBeforeAnythingFailsWhatFollows) {
  const Group group = NewGroup();
  Run(group, world(), [&](RankThread& t) {
    if (t.rank() == 0) t.group.Abort(absl::CancelledError("no more"));
    const auto values = t.Put(Zeros(100));
    EXPECT_EQ(Summary(SumUp(t, values)),
              t.rank() == 0 ? "no more" : "COLLECTIVE_FAILED rank 0");
  });
}

// What a late rank sends must not find its way into memory that the others
// were given back.
TEST_P(CollectivesConformanceTest, MemoryIsLeftAloneAfterAFailure) {
  if (world() == 1) GTEST_SKIP();
  Group group = NewGroup();
  const int64_t n = 100000;
  const size_t late = static_cast<size_t>(world() - 1);
  const std::vector<float> mark(static_cast<size_t>(n * world()), -7.0f);
  std::vector<OnDevice<float>> fulls(late), shards(late);
  std::atomic<int> queued{0};
  std::thread aborter([&] {
    while (queued < world() - 1) std::this_thread::yield();
    group[0]->Abort(absl::CancelledError("no more"));
  });
  Run(group, world() - 1, [&](RankThread& t) {
    const size_t rank = static_cast<size_t>(t.rank());
    shards[rank] = t.Put(Values<float>(t.rank(), n, 1));
    fulls[rank] = t.Put(Zeros(mark.size()));
    const auto ticket = t.group.AllGather(t.stream, shards[rank].tensor(),
                                          fulls[rank].tensor());
    ++queued;
    EXPECT_FALSE(t.Wait(ticket).ok());
    fulls[rank].Write(t.stream, mark);
  });
  aborter.join();
  RankThread last(*group.back(), device());
  const auto shard = last.Put(Values<float>(world() - 1, n, 1));
  const auto full = last.Put(mark);
  EXPECT_FALSE(last.Wait(last.group.AllGather(last.stream, shard.tensor(),
                                              full.tensor()))
                   .ok());
  group.clear();
  for (const auto& left : fulls) ExpectSame(left.Read(last.stream), mark);
}

// Aborts at all stages of a transfer. Memory that is in use again as soon as
// Wait returns keeps what is put there; what is freed, a sanitizer watches.
TEST_P(CollectivesConformanceTest, MemoryIsFreeAfterAnAbortInTheMiddle) {
  if (world() == 1) GTEST_SKIP();
  for (int round = 0; round < 6; ++round) {
    Group group = NewGroup();
    std::atomic<bool> begun{false};
    std::thread aborter([&] {
      while (!begun) std::this_thread::yield();
      for (int i = 0; i < round * 50; ++i) std::this_thread::yield();
      group[0]->Abort(absl::CancelledError("no more"));
    });
    const size_t n = 1 << 18;
    const std::vector<float> mark(n * static_cast<size_t>(world()), -7.0f);
    std::vector<OnDevice<float>> left(static_cast<size_t>(world()));
    Run(group, world(), [&](RankThread& t) {
      const auto shard = t.Put(Zeros(n));
      auto full = t.Put(Zeros(mark.size()));
      absl::Status status;
      while (status.ok()) {
        const auto ticket =
            t.group.AllGather(t.stream, shard.tensor(), full.tensor());
        begun = true;
        status = t.Wait(ticket);
      }
      EXPECT_EQ(Summary(status),
                t.rank() == 0 ? "no more" : "COLLECTIVE_FAILED rank 0");
      if ((t.rank() + round) % 2 == 0) return;
      full.Write(t.stream, mark);
      left[static_cast<size_t>(t.rank())] = full;
    });
    aborter.join();
    group.clear();
    const std::unique_ptr<Stream> stream = device().NewStream();
    for (const auto& full : left) {
      if (!full.empty()) ExpectSame(full.Read(*stream), mark);
    }
  }
}

TEST_P(CollectivesConformanceTest, WhatWasDoneStaysDone) {
  const Group group = NewGroup();
  Run(group, world(), [&](RankThread& t) {
    const auto first = t.Put(Values<float>(t.rank(), 50, 1));
    const auto second = t.Put(Zeros(50));
    const auto ticket = t.group.AllReduce(t.stream, first.tensor());
    ASSERT_TRUE(t.Wait(ticket).ok());
    // Everybody has done the first when one has done the second.
    (void)SumUp(t, second);
    t.group.Abort(absl::CancelledError("no more"));
    EXPECT_FALSE(SumUp(t, second).ok());
    EXPECT_TRUE(t.Wait(ticket).ok());
    ExpectSame(first.Read(t.stream), SumOfValues<float>(t.world(), 0, 50, 1));
  });
}

TEST_P(CollectivesConformanceTest, DestructionEndsQueuedWork) {
  if (world() == 1) GTEST_SKIP();
  Group group = NewGroup();
  const absl::Time start = absl::Now();
  {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < world() - 1; ++rank) {
      threads.emplace_back([&, rank] {
        RankThread t(*group[static_cast<size_t>(rank)], device());
        std::vector<OnDevice<float>> mine;
        for (int i = 0; i < 10; ++i) mine.push_back(t.Put(Zeros(1000)));
        for (const auto& values : mine) {
          t.group.AllReduce(t.stream, values.tensor());
        }
        group[static_cast<size_t>(rank)].reset();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  RankThread last(*group.back(), device());
  const std::string error = Summary(SumUp(last, last.Put(Zeros(1000))));
  EXPECT_EQ(error.substr(0, error.size() - 1), "COLLECTIVE_FAILED rank ");
  EXPECT_LT(absl::Now() - start, kSoon);
}

// Ranks finish at different times; who is done may go.
TEST_P(CollectivesConformanceTest, ARankThatIsDoneLeavesTheOthersInPeace) {
  for (int round = 0; round < 5; ++round) {
    Group group = NewGroup();
    Run(group, world(), [&](RankThread& t) {
      const auto small = t.Put(Values<float>(t.rank(), 10, 1));
      const auto large = t.Put(Values<float>(t.rank(), 100000, 2));
      const auto first = t.group.AllReduce(t.stream, small.tensor());
      const auto second = t.group.AllReduce(t.stream, large.tensor());
      EXPECT_TRUE(t.Wait(first).ok());
      EXPECT_TRUE(t.Wait(second).ok());
      ExpectSame(large.Read(t.stream),
                 SumOfValues<float>(t.world(), 0, 100000, 2));
      group[static_cast<size_t>(t.rank())].reset();
    });
  }
}

TEST_P(CollectivesConformanceTest, WhoWaitsForARankThatLeftIsTold) {
  if (world() == 1) GTEST_SKIP();
  Group group = NewGroup();
  group.back().reset();
  Run(group, world() - 1, [&](RankThread& t) {
    const auto values = t.Put(Zeros(10));
    EXPECT_EQ(Summary(SumUp(t, values)),
              "COLLECTIVE_FAILED rank " + std::to_string(world() - 1));
  });
}

}  // namespace
}  // namespace gradwire
