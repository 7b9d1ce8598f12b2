// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <numeric>
#include <thread>
#include <vector>

#include "base/error.h"
#include "device/arena.h"
#include "device/cpu_device.h"
#include "device/prefault.h"
#include "device/thread_pool.h"

namespace gradwire {
namespace {

TEST(ThreadPoolTest, ParallelForCoversEveryIndexOnce) {
  for (int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    for (int64_t n : {0, 1, 2, 7, 64, 1000}) {
      for (int64_t grain : {1, 3, 64}) {
        std::vector<std::atomic<int>> hits(n);
        pool.ParallelFor(n, grain, [&](int64_t begin, int64_t end) {
          EXPECT_EQ(begin % grain, 0);
          for (int64_t i = begin; i < end; ++i) hits[i].fetch_add(1);
        });
        for (auto& hit : hits) EXPECT_EQ(hit.load(), 1);
      }
    }
  }
}

TEST(ThreadPoolTest, ParallelItemsRunsEachItemOnceOnAKnownThread) {
  ThreadPool pool(3);
  for (int round = 0; round < 100; ++round) {
    std::vector<std::atomic<int>> hits(17);
    pool.ParallelItems(17, [&](int64_t item, int thread) {
      EXPECT_GE(thread, 0);
      EXPECT_LT(thread, 3);
      hits[item].fetch_add(1);
    });
    for (auto& hit : hits) EXPECT_EQ(hit.load(), 1);
  }
}

TEST(CpuDeviceTest, CopiesAndZeroes) {
  CpuDevice device(3);
  const auto stream = device.NewStream();
  // One thread's share, and all threads'.
  for (const int64_t n : {int64_t{5}, int64_t{1} << 20}) {
    const auto buffer = device.Allocate(2 * n * 4);
    ASSERT_TRUE(buffer.ok());
    const Tensor all((*buffer)->data(), DType::kF32, {2 * n});
    std::iota(all.data<float>(), all.data<float>() + n, 1.0f);
    device.Copy(*stream, all.Rows(0, n), all.Rows(n, 2 * n));
    device.Zero(*stream, all.Rows(0, n));
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(all.data<float>()[i], 0.0f);
      ASSERT_EQ(all.data<float>()[n + i], static_cast<float>(i + 1));
    }
  }
}

int64_t PageBytes() { return sysconf(_SC_PAGESIZE); }

int64_t NumPages(int64_t bytes) {
  return (bytes + PageBytes() - 1) / PageBytes();
}

int64_t PresentPages(const DeviceBuffer& buffer) {
  std::vector<unsigned char> pages(NumPages(buffer.bytes()));
  EXPECT_EQ(
      mincore(buffer.data(), static_cast<size_t>(buffer.bytes()), pages.data()),
      0);
  return std::count_if(pages.begin(), pages.end(),
                       [](unsigned char page) { return (page & 1) != 0; });
}

// Waits until it says so many bytes, for at most `limit`; returns what it says.
int64_t Await(const Prefault& prefault, int64_t bytes,
              std::chrono::milliseconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (prefault.present() < bytes && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return prefault.present();
}

class PrefaultTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto buffer = device_.Allocate(PageBytes());
    ASSERT_TRUE(buffer.ok());
    // MADV_POPULATE_WRITE
    if (madvise((*buffer)->data(), static_cast<size_t>(PageBytes()), 23) != 0) {
      GTEST_SKIP() << "before Linux 5.14";
    }
  }

  CpuDevice device_{1};
};

TEST_F(PrefaultTest, MakesPagesPresentAndChangesNothing) {
  // The last piece is not a whole page.
  const int64_t bytes = (40 << 20) + 100;
  const auto buffer = device_.Allocate(bytes);
  ASSERT_TRUE(buffer.ok());
  char* const data = static_cast<char*>((*buffer)->data());
  data[5] = 7;
  data[bytes - 1] = 9;
  ASSERT_LT(PresentPages(**buffer), NumPages(bytes) - 1);
  // From the middle of a page on.
  Prefault prefault(data + 300, bytes - 300, 0);
  EXPECT_EQ(Await(prefault, bytes - 300, std::chrono::seconds(60)),
            bytes - 300);
  EXPECT_EQ(PresentPages(**buffer), NumPages(bytes));
  EXPECT_EQ(std::accumulate(data, data + bytes, int64_t{0}), 16);
  EXPECT_EQ(data[5], 7);
}

TEST_F(PrefaultTest, EndsWhereMemoryIsRefused) {
  const auto buffer = device_.Allocate(48 << 20);
  ASSERT_TRUE(buffer.ok());
  char* const data = static_cast<char*>((*buffer)->data());
  ASSERT_EQ(mprotect(data + (16 << 20), 16 << 20, PROT_READ), 0);
  Prefault prefault(data, (*buffer)->bytes(), 0);
  EXPECT_EQ(Await(prefault, 16 << 20, std::chrono::seconds(60)), 16 << 20);
  EXPECT_EQ(Await(prefault, 48 << 20, std::chrono::milliseconds(500)),
            16 << 20);
}

TEST_F(PrefaultTest, LeavesTheReserve) {
  const auto buffer = device_.Allocate(48 << 20);
  ASSERT_TRUE(buffer.ok());
  Prefault prefault((*buffer)->data(), (*buffer)->bytes(),
                    AvailableHostBytes() * 2);
  EXPECT_EQ(Await(prefault, 1, std::chrono::milliseconds(500)), 0);
}

TEST_F(PrefaultTest, EndsWithItsOwner) {
  // Whoever does not look whether it should end makes all of them present.
  constexpr int kRounds = 8;
  const int64_t bytes = 256 << 20;
  int64_t present = 0;
  for (int round = 0; round < kRounds; ++round) {
    const auto buffer = device_.Allocate(bytes);
    ASSERT_TRUE(buffer.ok());
    { const Prefault prefault((*buffer)->data(), (*buffer)->bytes(), 0); }
    present += PresentPages(**buffer);
  }
  EXPECT_LT(present, kRounds * NumPages(bytes) / 2);
}

TEST(ArenaTest, TensorsAreAlignedDisjointAndZero) {
  CpuDevice device(1);
  auto arena = Arena::Create(device, 4096);
  ASSERT_TRUE(arena.ok());
  Tensor a = arena->Alloc("a", DType::kF32, {3, 5});
  Tensor b = arena->Alloc("b", DType::kBF16, {7});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b.raw()) % Arena::kAlignment, 0u);
  EXPECT_GE(static_cast<char*>(b.raw()),
            static_cast<char*>(a.raw()) + a.bytes());
  for (int i = 0; i < 15; ++i) EXPECT_EQ(a.data<float>()[i], 0.0f);
  const int64_t mark = arena->Mark();
  Tensor c = arena->Alloc("c", DType::kI64, {2});
  arena->ResetTo(mark);
  EXPECT_EQ(arena->Alloc("d", DType::kI64, {2}).raw(), c.raw());
}

TEST(ArenaDeathTest, OverflowingThePlanEndsTheProcess) {
  CpuDevice device(1);
  auto arena = Arena::Create(device, 512);
  ASSERT_TRUE(arena.ok());
  EXPECT_DEATH(arena->Alloc("big", DType::kF32, {129}), "arena: big");
}

TEST(CpuDeviceTest, AnAbsurdAllocationIsAnErrorWithNumbers) {
  CpuDevice device(1);
  auto buffer = device.Allocate(int64_t{1} << 60);
  ASSERT_FALSE(buffer.ok());
  EXPECT_EQ(GetErrorDetail(buffer.status())->reason, "OUT_OF_MEMORY");
}

TEST(CpuDeviceTest, KnowsItsMemory) {
  CpuDevice device(1);
  EXPECT_GT(device.AvailableBytes(), 0);
}

TEST(TensorTest, RowsAndReshapeView) {
  std::vector<float> data(12);
  std::iota(data.begin(), data.end(), 0.0f);
  Tensor t(data.data(), DType::kF32, {3, 4});
  EXPECT_EQ(t.Rows(1, 3).data<float>()[0], 4.0f);
  EXPECT_EQ(t.Rows(1, 3).num_elements(), 8);
  EXPECT_EQ(t.Reshape({12}).dim(0), 12);
  EXPECT_EQ(t.DebugString(), "f32[3, 4]");
  EXPECT_TRUE(Tensor().is_null());
}

TEST(BFloat16Test, RoundsToNearestEvenAndKeepsNan) {
  EXPECT_EQ(BFloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(BFloat16(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80);
  EXPECT_EQ(BFloat16(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82);
  EXPECT_TRUE(std::isnan(
      static_cast<float>(BFloat16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(StreamTest, TheFirstFailureSticksUntilFinish) {
  CpuDevice device(1);
  auto stream = device.NewStream();
  stream->Fail(absl::InternalError("first"));
  stream->Fail(absl::InternalError("second"));
  EXPECT_FALSE(stream->ok());
  EXPECT_EQ(stream->Finish().message(), "first");
  EXPECT_TRUE(stream->Finish().ok());
}

}  // namespace
}  // namespace gradwire
