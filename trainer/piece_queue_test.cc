// SPDX-License-Identifier: Apache-2.0
#include "trainer/piece_queue.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <vector>

namespace gradwire {
namespace {

using std::chrono::milliseconds;

bool IsReady(const std::future<void>& future, milliseconds timeout) {
  return future.wait_for(timeout) == std::future_status::ready;
}

PieceQueue::Piece PieceOf(int64_t bytes) {
  return {std::vector<char>(static_cast<size_t>(bytes)), bytes};
}

TEST(PieceQueue, HoldsNoMoreThanItMay) {
  PieceQueue queue(10);
  queue.Push(PieceOf(4));
  queue.Push(PieceOf(6));
  const auto third =
      std::async(std::launch::async, [&] { queue.Push(PieceOf(1)); });
  EXPECT_FALSE(IsReady(third, milliseconds(100)));
  EXPECT_EQ((*queue.Take())->elements, 4);
  third.wait();
  EXPECT_EQ((*queue.Take())->elements, 6);
  EXPECT_EQ((*queue.Take())->elements, 1);
  queue.End(absl::OkStatus());
  EXPECT_FALSE(queue.Take()->has_value());
}

TEST(PieceQueue, HoldsOneThatIsLarger) {
  PieceQueue queue(0);
  queue.Push(PieceOf(5));
  const auto second = std::async(std::launch::async, [&] {
    queue.Push(PieceOf(3));
    queue.End(absl::DataLossError("gone"));
  });
  EXPECT_FALSE(IsReady(second, milliseconds(100)));
  EXPECT_EQ((*queue.Take())->elements, 5);
  // What came before an error is handed out before it.
  EXPECT_EQ((*queue.Take())->elements, 3);
  EXPECT_TRUE(absl::IsDataLoss(queue.Take().status()));
  second.wait();
}

TEST(PieceQueue, NobodyWaitsForOneThatIsClosed) {
  PieceQueue queue(1);
  queue.Push(PieceOf(1));
  const auto second = std::async(std::launch::async, [&] {
    queue.Push(PieceOf(1));
    queue.Push(PieceOf(1));
  });
  EXPECT_FALSE(IsReady(second, milliseconds(50)));
  queue.Close();
  EXPECT_TRUE(IsReady(second, milliseconds(60000)));
}

}  // namespace
}  // namespace gradwire
