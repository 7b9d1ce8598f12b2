// SPDX-License-Identifier: Apache-2.0
// Products of warpgroups on the emulator: they give what they must, and each
// kind of mistake that it is there to see is seen.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device/cuda/kernel.h"
#include "device/cuda/warpgroup.h"
#include "device/dtype.h"
#include "tests/cuda_emulator/on_device.h"

namespace gradwire {
namespace {

enum class Mistake {
  kNone,
  kNotShown,
  kShownAfterTheBarrier,
  kNoBarrier,
  kNotBegun,
  kSecondNotBegun,
  kNotCommitted,
  kNotWaitedFor,
  kReadEarly,
  kWrittenOverEarly,
  kWrittenOverWithoutBarrier,
  kMisplaced,
  kFewerWarps,
  kOtherRows,
  kWrittenWhileOnItsWay,
  kOtherOperands,
};

constexpr int kRows = 128;  // of two warpgroups
constexpr int kColumns = 64;
using A = SwizzledTile<kRows, 64>;
using B = SwizzledTile<kColumns, 64>;
constexpr std::size_t kSharedBytes =
    sizeof(BFloat16) * (A::kElements + B::kElements) + 1024;

// d = 1 + a b^T + a b, all of 64 terms, where b is [64, 64].
__global__ void Product(Mistake mistake, const BFloat16* a, const BFloat16* b,
                        float* d) {
  SharedMemory memory;
  const A sa{memory.Take<BFloat16, A::kAlign>(A::kElements)};
  if (mistake == Mistake::kMisplaced) memory.Take<BFloat16>(64);
  const B sb{mistake == Mistake::kMisplaced
                 ? memory.Take<BFloat16>(B::kElements)
                 : memory.Take<BFloat16, B::kAlign>(B::kElements)};
  const auto thread = static_cast<int>(threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x);
  for (int i = thread; i < A::kElements / 8; i += threads) {
    CopyAsync16(sa.elements, A::At(i / 8, i % 8 * 8), a + i * 8);
  }
  for (int i = thread; i < B::kElements; i += threads) {
    sb.elements[B::At(i / 64, i % 64)] = b[i];
  }
  CommitAsync();
  WaitAsync<0>();
  const bool late = mistake == Mistake::kShownAfterTheBarrier;
  if (!late && (mistake != Mistake::kNotShown || thread != 77)) {
    ShowToProducts();
  }
  if (mistake != Mistake::kNoBarrier) __syncthreads();
  if (late) ShowToProducts();

  const int lane = thread % 32, warp = thread / 32;
  const int row = warp * 16 + lane / 4;
  uint32_t left[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int r = 0; r < 4; ++r) {
      const int at = (row + r % 2 * 8) * 64 + k * 16 + r / 2 * 8 + lane % 4 * 2;
      left[k][r] = a[at].bits | static_cast<uint32_t>(a[at + 1].bits) << 16;
    }
  }
  WarpgroupSums<kColumns / 8> sums;
  for (auto& tile : sums) tile[0] = tile[1] = tile[2] = tile[3] = 1.0f;
  if (mistake != Mistake::kNotBegun) BeginProducts();
  const int first_row = thread / kWarpgroup * 64;
  for (int k = 0; k < 64; k += 16) {
    const int other = mistake == Mistake::kOtherOperands && lane == 3 ? 16 : 0;
    const int its_row =
        mistake == Mistake::kOtherRows && warp == 1 ? 64 : first_row;
    MultiplyRows(sums, sa.Rows(its_row, k), sb.Rows(0, k ^ other), true);
  }
  CommitProducts();
  if (mistake != Mistake::kSecondNotBegun) BeginProducts();
  // Operands of a product that is on its way.
  if (mistake == Mistake::kWrittenOverEarly) {
    if (warp == 5) sb.elements[lane] = BFloat16(0.0f);
    __syncthreads();
  }
  if (mistake != Mistake::kFewerWarps || warp != 2) {
    for (int k = 0; k < 64; k += 16) {
      MultiplyColumns(sums, left[k / 16], sb.Columns(k), true);
    }
  }
  if (mistake != Mistake::kNotCommitted) CommitProducts();
  const float early = sums[0][0];
  if (mistake == Mistake::kWrittenWhileOnItsWay) sums[3][1] = 0.0f;
  if (mistake != Mistake::kNotWaitedFor) WaitProducts<0>();
  HoldSums(sums);
  if (mistake == Mistake::kReadEarly) sums[0][0] = early;
  if (mistake == Mistake::kWrittenOverWithoutBarrier && warp == 5) {
    sb.elements[lane] = BFloat16(0.0f);
  }
  for (int n = 0; n < kColumns / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      d[(row + i / 2 * 8) * kColumns + n * 8 + lane % 4 * 2 + i % 2] =
          sums[n][i];
    }
  }
}

float OfA(int row, int k) {
  return static_cast<float>((row * 7 + k * 3 + row * k) % 11 - 5);
}
float OfB(int row, int k) {
  return static_cast<float>((row * 5 + k + row * k) % 7 - 3);
}

std::vector<float> Multiply(Mistake mistake, int threads = 256) {
  std::vector<BFloat16> a(A::kElements), b(B::kElements);
  for (int i = 0; i < A::kElements; ++i) a[i] = BFloat16(OfA(i / 64, i % 64));
  for (int i = 0; i < B::kElements; ++i) b[i] = BFloat16(OfB(i / 64, i % 64));
  const OnDevice<BFloat16> da(a), db(b);
  const OnDevice<float> d(std::vector<float>(kRows * kColumns));
  OnStream([&](cudaStream_t stream) {
    return LaunchWarpgroups(Product, dim3(1), dim3(threads), kSharedBytes,
                            stream, mistake,
                            static_cast<const BFloat16*>(da.data()),
                            static_cast<const BFloat16*>(db.data()), d.data());
  });
  return d.Fetch();
}

TEST(WarpgroupProductsTest, AreThoseOfTheMatrices) {
  const std::vector<float> got = Multiply(Mistake::kNone);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      float want = 1;
      for (int k = 0; k < 64; ++k) {
        want += OfA(i, k) * (OfB(j, k) + OfB(k, j));
      }
      ASSERT_EQ(got[i * kColumns + j], want) << i << " " << j;
    }
  }
}

TEST(WarpgroupProductsTest, SumsAreNotThereBeforeTheyAreWaitedFor) {
  EXPECT_TRUE(std::isnan(Multiply(Mistake::kReadEarly)[0]));
}

TEST(WarpgroupProductsTest, NeedTheirOwnLaunch) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto launch = [] {
    const OnDevice<BFloat16> in(std::vector<BFloat16>(A::kElements));
    const OnDevice<float> d(std::vector<float>(kRows * kColumns));
    OnStream([&](cudaStream_t stream) {
      return Launch(Product, dim3(1), dim3(256), kSharedBytes, stream,
                    Mistake::kNone, static_cast<const BFloat16*>(in.data()),
                    static_cast<const BFloat16*>(in.data()), d.data());
    });
  };
  EXPECT_DEATH(launch(), "in a kernel of Launch");
}

TEST(WarpgroupProductsTest, NeedWholeWarpgroups) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(Multiply(Mistake::kNone, 192), "not of whole warpgroups");
}

TEST(WarpgroupProductsTest, AsMuchSharedMemoryAsThereIs) {
  const auto launch = [](std::size_t bytes) {
    const OnDevice<BFloat16> in(std::vector<BFloat16>(A::kElements));
    const OnDevice<float> d(std::vector<float>(kRows * kColumns));
    const cudaError_t error = LaunchWarpgroups(
        Product, dim3(1), dim3(256), bytes, nullptr, Mistake::kNone,
        static_cast<const BFloat16*>(in.data()),
        static_cast<const BFloat16*>(in.data()), d.data());
    cudaStreamSynchronize(nullptr);
    return error;
  };
  EXPECT_EQ(launch(227 << 10), cudaSuccess);
  EXPECT_EQ(launch((227 << 10) + 1), cudaErrorInvalidConfiguration);
}

struct Seeded {
  const char* name;
  Mistake mistake;
  const char* word;
};

class WarpgroupMistakeTest : public testing::TestWithParam<Seeded> {};

TEST_P(WarpgroupMistakeTest, IsFound) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(Multiply(GetParam().mistake), GetParam().word);
}

INSTANTIATE_TEST_SUITE_P(
    Each, WarpgroupMistakeTest,
    testing::Values(
        Seeded{"NotShown", Mistake::kNotShown, "was not shown"},
        Seeded{"NoBarrier", Mistake::kNoBarrier, "race: |never written"},
        Seeded{"ShownAfterTheBarrier", Mistake::kShownAfterTheBarrier,
               "parts from showing"},
        Seeded{"NotBegun", Mistake::kNotBegun, "without BeginProducts"},
        Seeded{"SecondNotBegun", Mistake::kSecondNotBegun,
               "without BeginProducts"},
        Seeded{"NotCommitted", Mistake::kNotCommitted,
               "before its products are waited for"},
        Seeded{"NotWaitedFor", Mistake::kNotWaitedFor,
               "before its products are waited for"},
        Seeded{"WrittenOverEarly", Mistake::kWrittenOverEarly, "not shown"},
        Seeded{"WrittenOverWithoutBarrier", Mistake::kWrittenOverWithoutBarrier,
               "race: "},
        Seeded{"Misplaced", Mistake::kMisplaced, "multiple of 1024"},
        Seeded{"FewerWarps", Mistake::kFewerWarps, "other products"},
        Seeded{"OtherRows", Mistake::kOtherRows, "other products"},
        Seeded{"WrittenWhileOnItsWay", Mistake::kWrittenWhileOnItsWay,
               "on its way"},
        Seeded{"OtherOperands", Mistake::kOtherOperands, "different operands"}),
    [](const testing::TestParamInfo<Seeded>& info) {
      return std::string(info.param.name);
    });

}  // namespace
}  // namespace gradwire
