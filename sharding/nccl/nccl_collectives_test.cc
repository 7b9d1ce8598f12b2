// SPDX-License-Identifier: Apache-2.0
// Ranks that are threads, on the emulator.
#include "sharding/nccl/nccl_collectives.h"

#include <gtest/gtest.h>

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
#include "tests/cuda_emulator/nccl_faults.h"

namespace gradwire {
namespace {

const std::shared_ptr<CudaDevice>& TheDevice() {
  static const auto* const device = [] {
    auto made = CudaDevice::Create(0);
    GW_CHECK(made.ok());
    return new std::shared_ptr<CudaDevice>(*std::move(made));
  }();
  return *device;
}

std::vector<std::unique_ptr<Collectives>> NewGroup(int world,
                                                   absl::Duration timeout) {
  AddressBoard board(world);
  std::vector<std::unique_ptr<Collectives>> ranks(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      auto made = NewNcclCollectives(
          *TheDevice(),
          {.control = {.rank = rank, .world = world, .timeout = timeout},
           // Several turns for what the suite takes for large.
           .staging_bytes = 1 << 20},
          board.ForRank(rank));
      GW_CHECK(made.ok());
      ranks[static_cast<size_t>(rank)] = *std::move(made);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return ranks;
}

// Each rank has four threads here: what seven would show, four do.
std::vector<CollectivesBackend> UpToFour() {
  std::vector<CollectivesBackend> backends =
      ForEveryWorld(NewGroup, TheDevice());
  std::erase_if(backends,
                [](const auto& backend) { return backend.world > 4; });
  return backends;
}

INSTANTIATE_TEST_SUITE_P(Nccl, CollectivesConformanceTest,
                         testing::ValuesIn(UpToFour()), BackendName);

std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : std::string(status.message());
}

TEST(NcclCollectivesTest, AFailureOfNcclAbortsItAndTellsThePeers) {
  auto group = NewGroup(2, absl::Seconds(100));
  RankThread zero(*group[0], *TheDevice()), one(*group[1], *TheDevice());
  const auto a = zero.Put(std::vector<float>(1000));
  const auto b = one.Put(std::vector<float>(1000));
  cuda_emulator::BreakNccl(1);
  const auto first = zero.group.AllReduce(zero.stream, a.tensor());
  const auto second = one.group.AllReduce(one.stream, b.tensor());
  const absl::Status failed = one.Wait(second);
  EXPECT_EQ(ReasonOf(failed), "COLLECTIVE_FAILED");
  EXPECT_EQ(GetErrorDetail(failed)->metadata.at("rank"), "1");
  EXPECT_EQ(GetErrorDetail(failed)->metadata.at("cause").substr(0, 5), "NCCL:");
  const absl::Status told = zero.Wait(first);
  EXPECT_EQ(ReasonOf(told), "COLLECTIVE_FAILED");
  EXPECT_EQ(GetErrorDetail(told)->metadata.at("rank"), "1");
  EXPECT_TRUE(cuda_emulator::WasAborted(0));
  EXPECT_TRUE(cuda_emulator::WasAborted(1));
}

TEST(NcclCollectivesTest, AGroupThatEndsInPeaceIsNotAborted) {
  auto group = NewGroup(2, absl::Seconds(100));
  group.clear();
  EXPECT_FALSE(cuda_emulator::WasAborted(0));
  EXPECT_FALSE(cuda_emulator::WasAborted(1));
}

// Wait does not hold the host up: what it makes a stream wait for shows when
// the stream is synchronised.
TEST(NcclCollectivesTest, WaitReturnsBeforeTheCollectiveIsDone) {
  auto group = NewGroup(2, absl::Seconds(100));
  RankThread zero(*group[0], *TheDevice()), one(*group[1], *TheDevice());
  const auto a = zero.Put(std::vector<float>(100, 1.0f));
  const auto b = one.Put(std::vector<float>(100, 2.0f));
  const auto first = zero.group.AllReduce(zero.stream, a.tensor());
  EXPECT_TRUE(zero.group.Wait(zero.stream, first).ok());
  const auto second = one.group.AllReduce(one.stream, b.tensor());
  EXPECT_TRUE(one.Wait(second).ok());
  EXPECT_EQ(a.Read(zero.stream), std::vector<float>(100, 3.0f));
}

TEST(NcclCollectivesTest, TheTimeThatAStreamWaitsIsCounted) {
  auto group = NewGroup(2, absl::Seconds(100));
  RankThread zero(*group[0], *TheDevice()), one(*group[1], *TheDevice());
  const auto a = zero.Put(std::vector<float>(100));
  const auto b = one.Put(std::vector<float>(100));
  // A stream that is slow to begin to wait waits for nothing.
  const absl::Time end = absl::Now() + absl::Seconds(60);
  while (zero.group.statistics().wait_seconds == 0 && absl::Now() < end) {
    const auto first = zero.group.AllReduce(zero.stream, a.tensor());
    ASSERT_TRUE(zero.group.Wait(zero.stream, first).ok());
    absl::SleepFor(absl::Milliseconds(10));
    ASSERT_TRUE(one.Wait(one.group.AllReduce(one.stream, b.tensor())).ok());
    ASSERT_TRUE(zero.stream.Finish().ok());
  }
  EXPECT_GT(zero.group.statistics().wait_seconds, 0);
  EXPECT_GT(zero.group.statistics().busy_seconds, 0);
}

TEST(NcclCollectivesTest, AStreamLearnsOfAFailureAfterWait) {
  auto group = NewGroup(2, absl::Seconds(100));
  RankThread zero(*group[0], *TheDevice());
  const auto a = zero.Put(std::vector<float>(100));
  const auto ticket = zero.group.AllReduce(zero.stream, a.tensor());
  EXPECT_TRUE(zero.group.Wait(zero.stream, ticket).ok());
  group[1]->Abort(absl::CancelledError("no more"));
  EXPECT_EQ(ReasonOf(zero.stream.Finish()), "COLLECTIVE_FAILED");
  // Even when the group is gone.
  const auto b = zero.Put(std::vector<float>(100));
  EXPECT_EQ(ReasonOf(zero.Wait(zero.group.AllReduce(zero.stream, b.tensor()))),
            "COLLECTIVE_FAILED");
}

}  // namespace
}  // namespace gradwire
