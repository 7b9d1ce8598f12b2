// SPDX-License-Identifier: Apache-2.0
// On the emulator, whose streams a test can hold up.
#include "device/cuda/pinned_ring.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "device/cuda/cuda_device.h"
#include "device/cuda/test_device.h"
#include "tests/cuda_emulator/streams.h"

namespace gradwire {
namespace {

constexpr int64_t kBytes = 4096;

class PinnedRingTest : public testing::Test {
 protected:
  PinnedRingTest()
      : device_(MakeTestDevice()),
        stream_(device_->NewStream()),
        ring_(*PinnedRing::Create(kBytes)),
        memory_(*device_->Allocate(int64_t{1} << 20)) {}

  CudaStream& stream() { return static_cast<CudaStream&>(*stream_); }
  char* memory() { return static_cast<char*>(memory_->data()); }
  std::vector<char> Fetch(int64_t bytes) {
    std::vector<char> values(static_cast<size_t>(bytes));
    ring_->CopyToHost(stream(), memory(), values.data(), bytes);
    EXPECT_TRUE(stream().Finish().ok());
    return values;
  }
  static std::vector<char> Values(int64_t bytes, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<char> values(static_cast<size_t>(bytes));
    for (char& value : values) value = static_cast<char>(random());
    return values;
  }

  std::unique_ptr<CudaDevice> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<PinnedRing> ring_;
  std::unique_ptr<DeviceBuffer> memory_;
};

TEST_F(PinnedRingTest, CopiesEverySizeBothWays) {
  for (int64_t bytes = 0; bytes < 3 * kBytes; bytes = bytes * 5 / 4 + 1) {
    std::vector<char> values = Values(bytes, static_cast<uint32_t>(bytes));
    const std::vector<char> want = values;
    ring_->CopyFromHost(stream(), values.data(), memory(), bytes);
    std::fill(values.begin(), values.end(), 'x');
    EXPECT_EQ(Fetch(bytes), want) << bytes;
  }
}

// What the device has not copied yet is not written over, and what fits is not
// waited for.
TEST_F(PinnedRingTest, WaitsForTheDeviceWhenItIsFull) {
  std::promise<void> held;
  cuda_emulator::StreamOf(stream().get())
      .Add([&, wait = held.get_future().share()] { wait.wait(); });
  const std::vector<char> want = Values(40 * 600, 1);
  int64_t at = 0;
  const auto copy = [&] {
    std::vector<char> values(want.begin() + at, want.begin() + at + 600);
    ring_->CopyFromHost(stream(), values.data(), memory() + at, 600);
    at += 600;
  };
  // 600 bytes take 640.
  for (int i = 0; i < 6; ++i) copy();
  std::atomic<bool> released = false;
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    released = true;
    held.set_value();
  });
  copy();
  EXPECT_TRUE(released);
  while (at < static_cast<int64_t>(want.size())) copy();
  other.join();
  EXPECT_EQ(Fetch(at), want);
}

// A stream that waits, for other threads perhaps, holds up nobody else's
// copies, however full of its own the ring is.
TEST_F(PinnedRingTest, AStreamThatWaitsHoldsUpNoOther) {
  std::promise<void> held;
  cuda_emulator::StreamOf(stream().get())
      .Add([&, wait = held.get_future().share()] { wait.wait(); });
  const std::vector<char> first = Values(6 * 640, 1);
  ring_->CopyFromHost(stream(), first.data(), memory() + 20'000, 6 * 640);
  std::thread blocked([&] {
    std::vector<char> got(first.size());
    ring_->CopyToHost(stream(), memory() + 20'000, got.data(), 6 * 640);
    EXPECT_EQ(got, first);
  });
  const auto own = device_->NewStream();
  auto& other = static_cast<CudaStream&>(*own);
  const std::vector<char> want = Values(2 * kBytes, 2);
  ring_->CopyFromHost(other, want.data(), memory(), 2 * kBytes);
  std::vector<char> got(want.size());
  ring_->CopyToHost(other, memory(), got.data(), 2 * kBytes);
  EXPECT_TRUE(other.Finish().ok());
  EXPECT_EQ(got, want);
  held.set_value();
  blocked.join();
}

TEST_F(PinnedRingTest, ServesSeveralThreads) {
  constexpr int64_t kPart = 50'000;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const auto own = device_->NewStream();
      auto& cuda = static_cast<CudaStream&>(*own);
      const std::vector<char> want = Values(kPart, static_cast<uint32_t>(i));
      std::vector<char> got(want.size());
      for (int round = 0; round < 5; ++round) {
        ring_->CopyFromHost(cuda, want.data(), memory() + i * kPart, kPart);
        ring_->CopyToHost(cuda, memory() + i * kPart, got.data(), kPart);
        EXPECT_EQ(got, want);
      }
      EXPECT_TRUE(cuda.Finish().ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(PinnedRingTest, AFailedStreamTakesNothing) {
  stream().Fail(absl::InternalError("before"));
  const std::vector<char> values = Values(100, 3);
  ring_->CopyFromHost(stream(), values.data(), memory(), 100);
  EXPECT_EQ(stream().Finish().message(), "before");
  EXPECT_EQ(Fetch(100), std::vector<char>(100, 0));
}

}  // namespace
}  // namespace gradwire
