// SPDX-License-Identifier: Apache-2.0
// The emulator itself: what kernels may do gives what a GPU gives, and each
// kind of mistake that it is there to see is seen.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "device/cuda/kernel.h"
#include "device/cuda/launch_record.h"
#include "device/dtype.h"
#include "tests/cuda_emulator/on_device.h"

namespace gradwire {
namespace {

constexpr unsigned kAll = 0xffffffffu;

std::vector<float> Counting(int n) {
  std::vector<float> values(n);
  for (int i = 0; i < n; ++i) values[i] = static_cast<float>(i);
  return values;
}

// Runs on a stream of its own, so that a death test needs no thread of others.
template <typename Kernel, typename... Arguments>
void RunOne(Kernel* kernel, int threads, std::size_t shared_bytes,
            Arguments... arguments) {
  OnStream([&](cudaStream_t stream) {
    return Launch(kernel, dim3(1), dim3(threads), shared_bytes, stream,
                  arguments...);
  });
}

// ---- What is right ----------------------------------------------------------

// out[block] = sum of the block's elements, by a tree in shared memory.
__global__ void TreeSum(const float* in, float* out) {
  SharedMemory memory;
  const SharedArray<float> sums =
      memory.Take<float>(static_cast<int>(blockDim.x));
  const auto thread = static_cast<int>(threadIdx.x);
  sums[thread] = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int width = static_cast<int>(blockDim.x) / 2; width > 0; width /= 2) {
    __syncthreads();
    if (thread < width) sums[thread] += sums[thread + width];
  }
  if (thread == 0) out[blockIdx.x] = sums[0];
}

TEST(CudaEmulatorTest, BlocksSumInSharedMemory) {
  const OnDevice<float> in(Counting(3 * 256));
  const OnDevice<float> out(std::vector<float>(3));
  ASSERT_EQ(Launch(TreeSum, dim3(3), dim3(256), 256 * sizeof(float), nullptr,
                   static_cast<const float*>(in.data()), out.data()),
            cudaSuccess);
  EXPECT_EQ(out.Fetch(), (std::vector<float>{32640, 98176, 163712}));
}

__global__ void WarpOps(float* out, unsigned* votes) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  float sum = static_cast<float>(threadIdx.x);
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kAll, sum, lanes);
  }
  const float third = __shfl_sync(kAll, static_cast<float>(threadIdx.x), 3);
  const float down = __shfl_down_sync(kAll, static_cast<float>(lane), 30);
  const float up = __shfl_up_sync(kAll, static_cast<float>(lane), 2);
  out[threadIdx.x] = sum + 1000 * third + 0.25f * down + 0.125f * up;
  votes[threadIdx.x] = __ballot_sync(kAll, lane % 3 == 0);
}

TEST(CudaEmulatorTest, LanesOfAWarpExchange) {
  const OnDevice<float> out(std::vector<float>(64));
  const OnDevice<unsigned> votes(std::vector<unsigned>(64));
  ASSERT_EQ(
      Launch(WarpOps, dim3(1), dim3(64), 0, nullptr, out.data(), votes.data()),
      cudaSuccess);
  const std::vector<float> got = out.Fetch();
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32;
    const int sum = i < 32 ? 496 : 1520;
    const int third = i < 32 ? 3 : 35;
    const int down = lane < 2 ? lane + 30 : lane;
    const int up = lane >= 2 ? lane - 2 : lane;
    EXPECT_EQ(got[i], sum + 1000 * third + 0.25 * down + 0.125 * up) << i;
    EXPECT_EQ(votes.Fetch()[i], 0x49249249u);
  }
}

// Counts threads by the lowest bit of their number, and adds up all numbers;
// `places` gets each thread's place among those of its count.
__global__ void AddAtomically(int* sums, unsigned long long* wide,
                              int* places) {
  const auto thread = static_cast<int>(threadIdx.x);
  places[thread] = atomicAdd(sums + __ffs(thread), 1);
  atomicAdd(wide, (1ull << 40) + static_cast<unsigned>(thread));
}

TEST(CudaEmulatorTest, AtomicSumsAreOfAllThreads) {
  const OnDevice<int> sums(std::vector<int>(8)), places(std::vector<int>(64));
  const OnDevice<unsigned long long> wide(std::vector<unsigned long long>(1));
  ASSERT_EQ(Launch(AddAtomically, dim3(1), dim3(64), 0, nullptr, sums.data(),
                   wide.data(), places.data()),
            cudaSuccess);
  // The lowest bit: none of 0, the first of every odd number.
  EXPECT_EQ(sums.Fetch(), (std::vector<int>{1, 32, 16, 8, 4, 2, 1, 0}));
  EXPECT_EQ(wide.Fetch()[0], (64ull << 40) + 63 * 32);
  // All places of each sum are taken, each by one.
  std::vector<int> odd;
  const std::vector<int> got = places.Fetch();
  for (int i = 1; i < 64; i += 2) odd.push_back(got[i]);
  std::sort(odd.begin(), odd.end());
  for (int i = 0; i < 32; ++i) EXPECT_EQ(odd[i], i);
}

// d = a b of [16, 16] and [16, 8], with what the tensor cores' wrappers say of
// where elements are.
__global__ void Product(const BFloat16* a, const BFloat16* b,
                        const BFloat16* b_transposed, float* d) {
  SharedMemory memory;
  const SharedArray<BFloat16> sa = memory.Take<BFloat16>(256);
  const SharedArray<BFloat16> sb = memory.Take<BFloat16>(128);
  const SharedArray<BFloat16> st = memory.Take<BFloat16>(128);
  const auto lane = static_cast<int>(threadIdx.x);
  CopyAsync16(sa, lane * 8, a + lane * 8);
  if (lane < 16) CopyAsync16(sb, lane * 8, b + lane * 8);
  CommitAsync();
  for (int i = lane; i < 128; i += 32) st[i] = b_transposed[i];
  WaitAsync<0>();
  __syncwarp();
  uint32_t fa[4], fb[2], ft[2];
  LdMatrixX4(fa, sa, lane % 16 * 16 + lane / 16 * 8);
  // [k][n]: rows of b are along k.
  LdMatrixX2Transposed(fb, sb, lane % 16 * 8);
  // [n][k]
  LdMatrixX2(ft, st, lane % 8 * 16 + lane / 8 % 2 * 8);
  float sums[4] = {1, 1, 1, 1};
  MmaBf16(sums, fa, fb);
  MmaBf16(sums, fa, ft);
  for (int i = 0; i < 4; ++i) {
    d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

TEST(CudaEmulatorTest, TensorCoresMultiply) {
  std::vector<BFloat16> a(256), b(128), t(128);
  std::vector<float> want(128, 1.0f);
  for (int i = 0; i < 256; ++i) a[i] = BFloat16(static_cast<float>(i * 7 % 13));
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) {
      b[k * 8 + n] = BFloat16(static_cast<float>((k * 5 + n * 3) % 11 - 5));
      t[n * 16 + k] = b[k * 8 + n];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < 16; ++k) {
        want[m * 8 + n] += 2 * static_cast<float>(a[m * 16 + k]) *
                           static_cast<float>(b[k * 8 + n]);
      }
    }
  }
  const OnDevice<BFloat16> da(a), db(b), dt(t);
  const OnDevice<float> d(std::vector<float>(128));
  ASSERT_EQ(Launch(Product, dim3(1), dim3(32), 1024 + 128, nullptr,
                   static_cast<const BFloat16*>(da.data()),
                   static_cast<const BFloat16*>(db.data()),
                   static_cast<const BFloat16*>(dt.data()), d.data()),
            cudaSuccess);
  EXPECT_EQ(d.Fetch(), want);
}

TEST(CudaEmulatorTest, CopiesOfHostMemoryReadItBeforeTheyReturn) {
  const OnDevice<float> to(std::vector<float>(8));
  std::vector<float> from(8, 1.0f);
  ASSERT_EQ(cudaMemcpyAsync(to.data(), from.data(), 32, cudaMemcpyHostToDevice,
                            nullptr),
            cudaSuccess);
  std::fill(from.begin(), from.end(), 2.0f);
  EXPECT_EQ(to.Fetch(), std::vector<float>(8, 1.0f));
}

__global__ void PackAndRaise(const float* x, uint32_t* pairs, float* powers) {
  const auto i = static_cast<int>(threadIdx.x);
  pairs[i] = PackBf16(x[i], -x[i]);
  powers[i] = Exp2Approx(x[i]);
}

TEST(CudaEmulatorTest, PairsAndPowersOfTwo) {
  std::vector<float> x(32);
  for (int i = 0; i < 32; ++i) x[i] = static_cast<float>(i) * 5.03f - 140.0f;
  x[31] = -std::numeric_limits<float>::infinity();
  const OnDevice<float> dx(x);
  const OnDevice<uint32_t> pairs(std::vector<uint32_t>(32));
  const OnDevice<float> powers(std::vector<float>(32));
  ASSERT_EQ(
      Launch(PackAndRaise, dim3(1), dim3(32), 0, nullptr,
             static_cast<const float*>(dx.data()), pairs.data(), powers.data()),
      cudaSuccess);
  const std::vector<uint32_t> got_pairs = pairs.Fetch();
  const std::vector<float> got_powers = powers.Fetch();
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(got_pairs[i] & 0xffffu, BFloat16(x[i]).bits);
    EXPECT_EQ(got_pairs[i] >> 16, BFloat16(-x[i]).bits);
    if (x[i] < -126.0f) {
      EXPECT_EQ(got_powers[i], 0.0f);
    } else {
      const float want = std::exp2(x[i]);
      EXPECT_NEAR(got_powers[i], want, want / (1 << 22));
    }
  }
}

__global__ void CopyBeyondTheEnd(const float* in, int n, float* out) {
  SharedMemory memory;
  const SharedArray<float> copy = memory.Take<float>(128);
  const auto i = static_cast<int>(threadIdx.x) * 4;
  CopyAsync16(copy, i, in + i, i < n);
  CommitAsync();
  WaitAsync<0>();
  for (int j = i; j < i + 4; ++j) out[j] = copy[j];
}

TEST(CudaEmulatorTest, WhatIsNotThereIsCopiedAsZeros) {
  const OnDevice<float> in(Counting(64));
  const OnDevice<float> out(std::vector<float>(128));
  ASSERT_EQ(Launch(CopyBeyondTheEnd, dim3(1), dim3(32), 512, nullptr,
                   static_cast<const float*>(in.data()), 64, out.data()),
            cudaSuccess);
  std::vector<float> want = Counting(64);
  want.resize(128);
  EXPECT_EQ(out.Fetch(), want);
}

TEST(CudaEmulatorTest, RefusesWhatTheHardwareRefuses) {
  const OnDevice<float> out(std::vector<float>(1));
  const auto launch = [&](dim3 grid, dim3 block, std::size_t shared) {
    return Launch(TreeSum, grid, block, shared, nullptr,
                  static_cast<const float*>(out.data()), out.data());
  };
  EXPECT_EQ(launch(dim3(1), dim3(1025), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(0), dim3(32), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1, 65536), dim3(32), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), dim3(32), (99 << 10) + 1),
            cudaErrorInvalidConfiguration);
}

TEST(CudaEmulatorTest, RefusesTheHostsMemory) {
  const OnDevice<float> out(std::vector<float>(1));
  const std::vector<float> host(32);
  EXPECT_EQ(
      Launch(TreeSum, dim3(1), dim3(32), 128, nullptr, host.data(), out.data()),
      cudaErrorIllegalAddress);
}

TEST(CudaEmulatorTest, AGraphIsOfTheDevicesWorkAlone) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
            cudaSuccess);
  const OnDevice<float> on(std::vector<float>(4));
  float host[4] = {};
  const auto capture = [&](const auto& call) {
    EXPECT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
              cudaSuccess);
    const cudaError_t called = call();
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    EXPECT_EQ(graph != nullptr, ended == cudaSuccess);
    if (graph != nullptr) cudaGraphDestroy(graph);
    EXPECT_EQ(called == cudaSuccess, ended == cudaSuccess);
    (void)cudaGetLastError();
    return called;
  };
  EXPECT_EQ(capture([&] { return cudaMemsetAsync(on.data(), 0, 16, stream); }),
            cudaSuccess);
  EXPECT_NE(capture([&] {
              return cudaMemcpyAsync(on.data(), host, 16,
                                     cudaMemcpyHostToDevice, stream);
            }),
            cudaSuccess);
  EXPECT_NE(capture([&] {
              return cudaMemcpyAsync(host, on.data(), 16,
                                     cudaMemcpyDeviceToHost, stream);
            }),
            cudaSuccess);
  EXPECT_NE(capture([&] { return cudaStreamSynchronize(stream); }),
            cudaSuccess);
  cudaStreamDestroy(stream);
}

TEST(CudaEmulatorDeathTest, ACallPastTheRecordOfItsSectionEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const OnDevice<float> on(std::vector<float>(4));
  LaunchRecord record(nullptr);
  EXPECT_DEATH(record.Take([&] { cudaMemsetAsync(on.data(), 0, 16, nullptr); }),
               "queued past the record");
}

// ---- What is wrong ----------------------------------------------------------

enum class Mistake {
  kNone,
  kNoBarrier,
  kNoBarrierBeforeWriting,
  kReadsBeyond,
  kWritesBeyond,
  kReadsUnwritten,
  kDivergentBarrier,
  kEndsBeforeBarrier,
  kDivergentWarp,
  kWarpBarrierForBlock,
  kCopyNotWaitedFor,
  kCopyNotOrdered,
  kNotAllLanes,
  kTakesTooMuch,
  kMisaligned,
};

// Each thread reads what its right neighbour has written, twice; with a mistake
// it is undefined what that is.
__global__ void Neighbours(Mistake mistake, const float* in, float* out) {
  SharedMemory memory;
  const auto threads = static_cast<int>(blockDim.x);
  const SharedArray<float> values = memory.Take<float>(threads);
  const auto i = static_cast<int>(threadIdx.x);
  const int next = (i + 1) % threads;
  if (mistake == Mistake::kTakesTooMuch) memory.Take<float>(1);
  if (mistake == Mistake::kCopyNotWaitedFor ||
      mistake == Mistake::kCopyNotOrdered) {
    if (i % 4 == 0) CopyAsync16(values, i, in + i);
    CommitAsync();
    if (mistake == Mistake::kCopyNotOrdered) WaitAsync<0>();
    if (mistake == Mistake::kCopyNotWaitedFor) __syncthreads();
  } else if (mistake != Mistake::kReadsUnwritten || i != 5) {
    values[i] = in[i];
  }
  if (mistake == Mistake::kEndsBeforeBarrier && i == 7) return;
  if (mistake == Mistake::kDivergentBarrier && i < 32) {
    __syncthreads();
  } else if (mistake == Mistake::kWarpBarrierForBlock) {
    __syncwarp();
  } else if (mistake != Mistake::kNoBarrier &&
             mistake != Mistake::kCopyNotOrdered) {
    __syncthreads();
  }
  if (mistake == Mistake::kDivergentWarp && i % 2 == 0) __syncwarp();
  if (mistake == Mistake::kNotAllLanes) __syncwarp(0xffffu);
  float sum = values[mistake == Mistake::kReadsBeyond ? i + 1 : next];
  if (mistake == Mistake::kMisaligned) sum += values.Load<float2>(next).x;
  if (mistake != Mistake::kNoBarrierBeforeWriting) __syncthreads();
  values[mistake == Mistake::kWritesBeyond ? i + 1 : i] = -sum;
  __syncthreads();
  out[i] = sum + values[next];
}

void RunNeighbours(Mistake mistake) {
  const OnDevice<float> in(Counting(64));
  const OnDevice<float> out(std::vector<float>(64));
  RunOne(Neighbours, 64, 64 * sizeof(float), mistake,
         static_cast<const float*>(in.data()), out.data());
}

TEST(CudaEmulatorTest, NoMistakeIsFoundWhereNoneIs) {
  RunNeighbours(Mistake::kNone);
}

void RunTreeSumAsIndependent() {
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, 0);
  const OnDevice<float> in(Counting(32));
  const OnDevice<float> out(Counting(1));
  LaunchIndependent(TreeSum, dim3(1), dim3(32), stream,
                    static_cast<const float*>(in.data()), out.data());
  cudaStreamSynchronize(stream);
}

TEST(CudaEmulatorTest, ThreadsThatAreIndependentDoNotWait) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(RunTreeSumAsIndependent(),
               "LaunchIndependent waits, or shares memory");
}

struct Seeded {
  const char* name;
  Mistake mistake;
  const char* word;
};

class CudaEmulatorMistakeTest : public testing::TestWithParam<Seeded> {};

TEST_P(CudaEmulatorMistakeTest, IsFound) {
  // Other threads' locks are not to be met in the child.
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(RunNeighbours(GetParam().mistake), GetParam().word);
}

INSTANTIATE_TEST_SUITE_P(
    Each, CudaEmulatorMistakeTest,
    testing::Values(
        Seeded{"NoBarrier", Mistake::kNoBarrier, "race: read|never written"},
        Seeded{"NoBarrierBeforeWriting", Mistake::kNoBarrierBeforeWriting,
               "race: "},
        Seeded{"ReadsBeyond", Mistake::kReadsBeyond, "out of bounds"},
        Seeded{"WritesBeyond", Mistake::kWritesBeyond, "out of bounds"},
        Seeded{"ReadsUnwritten", Mistake::kReadsUnwritten, "never written"},
        Seeded{"DivergentBarrier", Mistake::kDivergentBarrier,
               "divergent barrier"},
        Seeded{"EndsBeforeBarrier", Mistake::kEndsBeforeBarrier,
               "wait for others that will not come"},
        Seeded{"DivergentWarp", Mistake::kDivergentWarp,
               "wait for others that will not come"},
        Seeded{"WarpBarrierForBlock", Mistake::kWarpBarrierForBlock,
               "race: |never written"},
        Seeded{"CopyNotWaitedFor", Mistake::kCopyNotWaitedFor,
               "before the copy was waited for"},
        Seeded{"CopyNotOrdered", Mistake::kCopyNotOrdered,
               "race: read|never written|before the copy"},
        Seeded{"NotAllLanes", Mistake::kNotAllLanes, "not all lanes"},
        Seeded{"TakesTooMuch", Mistake::kTakesTooMuch, "was launched with 256"},
        Seeded{"Misaligned", Mistake::kMisaligned, "misaligned"}),
    [](const testing::TestParamInfo<Seeded>& info) {
      return std::string(info.param.name);
    });

}  // namespace
}  // namespace gradwire
