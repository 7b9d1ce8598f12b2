// SPDX-License-Identifier: Apache-2.0
#include "sharding/gloo/gloo_collectives.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "sharding/conformance.h"
#include "sharding/gloo/address_board.h"

namespace gradwire {
namespace {

// Ranks that are threads, each with connections of its own.
std::vector<std::unique_ptr<Collectives>> NewNamedGroup(
    int world, absl::Duration timeout, const std::vector<int>& names) {
  AddressBoard board(world);
  std::vector<std::unique_ptr<Collectives>> ranks(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      auto made = NewGlooCollectives(
          {.rank = rank, .world = world, .names = names, .timeout = timeout},
          board.ForRank(rank));
      GW_CHECK(made.ok());
      ranks[static_cast<size_t>(rank)] = *std::move(made);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return ranks;
}

std::vector<std::unique_ptr<Collectives>> NewGroup(int world,
                                                   absl::Duration timeout) {
  return NewNamedGroup(world, timeout, {});
}

INSTANTIATE_TEST_SUITE_P(Gloo, CollectivesConformanceTest,
                         testing::ValuesIn(ForEveryWorld(NewGroup)),
                         BackendName);

// Ranks of a larger world, which whoever reads of a failure knows by their
// numbers there.
TEST(GlooCollectivesTest, ErrorsNameTheRanksOfTheWorld) {
  for (const bool leaves : {true, false}) {
    auto group = NewNamedGroup(2, absl::Seconds(leaves ? 100 : 1), {3, 7});
    CpuDevice device(1);
    RankThread zero(*group[0], device);
    if (leaves) group[1]->Abort(absl::CancelledError("no more"));
    const auto values = zero.Put(std::vector<float>(10));
    const absl::Status status =
        zero.Wait(zero.group.AllReduce(zero.stream, values.tensor()));
    const auto detail = GetErrorDetail(status);
    ASSERT_TRUE(detail.has_value()) << status;
    EXPECT_EQ(detail->reason,
              leaves ? "COLLECTIVE_FAILED" : "COLLECTIVE_TIMEOUT");
    EXPECT_EQ(detail->metadata.at("rank"), "7");
  }
}

ExchangeAddresses Answer(std::vector<std::string> addresses) {
  return [addresses](const std::string&) {
    return absl::StatusOr<std::vector<std::string>>(addresses);
  };
}

std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : std::string(status.message());
}

TEST(GlooConnectTest, AnAddressThatIsNoneIsRefused) {
  for (const std::string address :
       {"", "localhost", "999.1.1.1", "8.8.8.8", "0.0.0.0", "::"}) {
    const auto made = NewGlooCollectives(
        {.rank = 0, .world = 2, .bind_address = address}, Answer({}));
    EXPECT_EQ(ReasonOf(made.status()), "ADDRESS_INVALID") << address;
  }
}

TEST(GlooConnectTest, WhatTheExchangeSaysComesBack) {
  const auto made =
      NewGlooCollectives({.rank = 0, .world = 2}, [](const std::string& mine) {
        EXPECT_FALSE(mine.empty());
        return absl::StatusOr<std::vector<std::string>>(
            absl::CancelledError("the supervisor went away"));
      });
  EXPECT_EQ(made.status().message(), "the supervisor went away");
}

TEST(GlooConnectTest, AddressesOfAnotherSizeAreRefused) {
  const std::vector<std::vector<std::string>> answers = {
      {}, {"", "", ""}, {"", ""}, {"", "short"}, {"", std::string(5000, 'x')}};
  for (const std::vector<std::string>& answer : answers) {
    const auto made =
        NewGlooCollectives({.rank = 0, .world = 2}, Answer(answer));
    EXPECT_EQ(ReasonOf(made.status()), "COLLECTIVE_FAILED");
  }
}

TEST(GlooConnectTest, AddressesThatMeanNothingAreRefused) {
  const auto made =
      NewGlooCollectives({.rank = 0, .world = 2}, [](const std::string& mine) {
        return absl::StatusOr<std::vector<std::string>>(
            {mine, std::string(mine.size(), 'x')});
      });
  EXPECT_EQ(ReasonOf(made.status()), "COLLECTIVE_FAILED");
}

TEST(GlooConnectTest, OneRankExchangesNothing) {
  const auto made = NewGlooCollectives({.rank = 0, .world = 1}, nullptr);
  EXPECT_TRUE(made.ok());
}

}  // namespace
}  // namespace gradwire
