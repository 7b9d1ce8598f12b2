// SPDX-License-Identifier: Apache-2.0
// Products of warpgroups are used where they are there and right, and only
// there.
#include "kernels/cuda/warpgroup_check.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "device/cuda/test_device.h"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/cuda_emulator/emulated_gpu.h"
#include "tests/cuda_emulator/products.h"

namespace gradwire {
namespace {

std::string Description() {
  const auto device = MakeTestDevice();
  const auto kernels = NewCudaKernels(*device);
  GW_CHECK(kernels.ok());
  return (*kernels)->description();
}

class WarpgroupCheckTest : public testing::Test {
 protected:
  ~WarpgroupCheckTest() override {
    cuda_emulator::SetComputeCapability(90);
    cuda_emulator::MisreadColumns(false);
    unsetenv("GRADWIRE_NO_WARPGROUPS");
  }
};

TEST_F(WarpgroupCheckTest, TheyAreUsedOnHopper) {
  EXPECT_EQ(Description(), "cuda sm_90, 4 multiprocessors");
}

TEST_F(WarpgroupCheckTest, OtherArchitecturesDoNotTryThem) {
  cuda_emulator::MisreadColumns(true);
  for (const int capability : {80, 89, 100, 120}) {
    cuda_emulator::SetComputeCapability(capability);
    EXPECT_EQ(Description(),
              "cuda sm_" + std::to_string(capability) + ", 4 multiprocessors");
  }
}

WarpgroupCheck Check() {
  const auto device = MakeTestDevice();
  const auto room = device->Allocate(kWarpgroupCheckFloats * sizeof(float));
  GW_CHECK(room.ok());
  WarpgroupCheck check;
  EXPECT_EQ(CheckWarpgroups(static_cast<float*>((*room)->data()), check),
            cudaSuccess);
  return check;
}

TEST_F(WarpgroupCheckTest, HardwareThatReadsOperandsInAnotherWayIsSeen) {
  EXPECT_TRUE(Check().Right());
  cuda_emulator::MisreadColumns(true);
  const WarpgroupCheck check = Check();
  EXPECT_EQ(check.by_rows, 0);
  EXPECT_EQ(check.by_rows_64, 0);
  EXPECT_GT(check.by_columns, 128 * 64);
  EXPECT_GT(check.by_columns_64, 128 * 32);
  // A replay then knows that attention's bits may differ.
  EXPECT_EQ(Description(), "cuda sm_90, 4 multiprocessors, no warpgroups");
}

TEST_F(WarpgroupCheckTest, CodeThatIsNotThereIsSeen) {
  cuda_emulator::SetComputeCapability(80);
  const WarpgroupCheck check = Check();
  EXPECT_EQ(check.by_rows, 128 * 128);
  EXPECT_EQ(check.by_columns_64, 128 * 64);
}

// On other architectures kernels of warpgroups are empty.
TEST_F(WarpgroupCheckTest, AttentionIsMadeOnEveryArchitecture) {
  for (const int capability : {80, 90, 100}) {
    cuda_emulator::SetComputeCapability(capability);
    const auto device = MakeTestDevice();
    const auto stream = device->NewStream();
    const auto kernels = NewCudaKernels(*device);
    GW_CHECK(kernels.ok());
    // One token sees itself alone: out is its value.
    const AttentionShape shape = {1, 1, 64, 1.0f};
    std::vector<BFloat16> qkv(3 * 64);
    for (int i = 0; i < 3 * 64; ++i) {
      qkv[i] = BFloat16(static_cast<float>(i % 7));
    }
    const int64_t workspace =
        (*kernels)->AttentionWorkspaceBytes(shape, DType::kBF16, 1);
    const auto memory = device->Allocate(4096 + workspace);
    GW_CHECK(memory.ok());
    char* const data = static_cast<char*>((*memory)->data());
    const Tensor on_device(data, DType::kBF16, {1, 3 * 64});
    const Tensor out(data + 1024, DType::kBF16, {1, 64});
    const Tensor lse(data + 2048, DType::kF32, {1, 1});
    device->CopyFromHost(*stream, qkv.data(), on_device);
    const int32_t cu_seqlens[] = {0, 1};
    Kernels::Attention args;
    args.shape = shape;
    args.layout = {cu_seqlens, 1};
    args.qkv = on_device;
    args.workspace = Tensor(data + 4096, DType::kF32, {workspace / 4});
    (*kernels)->AttentionForward(*stream, args, out, lse);
    std::vector<BFloat16> got(64);
    device->CopyToHost(*stream, out, got.data());
    ASSERT_TRUE(stream->Finish().ok());
    for (int i = 0; i < 64; ++i) {
      ASSERT_EQ(got[i].bits, qkv[128 + i].bits) << capability << " " << i;
    }
  }
}

TEST_F(WarpgroupCheckTest, AnOperatorCanSwitchThemOff) {
  setenv("GRADWIRE_NO_WARPGROUPS", "1", 1);
  EXPECT_EQ(Description(), "cuda sm_90, 4 multiprocessors, no warpgroups");
  for (const char* const on : {"", "0"}) {
    setenv("GRADWIRE_NO_WARPGROUPS", on, 1);
    EXPECT_EQ(Description(), "cuda sm_90, 4 multiprocessors");
  }
}

}  // namespace
}  // namespace gradwire
