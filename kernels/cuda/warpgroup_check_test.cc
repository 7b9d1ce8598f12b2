// SPDX-License-Identifier: Apache-2.0
// Products of warpgroups are used where they are there and right, and only
// there.
#include "kernels/cuda/warpgroup_check.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>

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

TEST_F(WarpgroupCheckTest, HardwareThatReadsOperandsInAnotherWayIsSeen) {
  cuda_emulator::MisreadColumns(true);
  const auto device = MakeTestDevice();
  const auto room = device->Allocate(kWarpgroupCheckFloats * sizeof(float));
  GW_CHECK(room.ok());
  bool right = true;
  ASSERT_EQ(CheckWarpgroups(static_cast<float*>((*room)->data()), right),
            cudaSuccess);
  EXPECT_FALSE(right);
  // A replay then knows that attention's bits may differ.
  EXPECT_EQ(Description(), "cuda sm_90, 4 multiprocessors, no warpgroups");
}

TEST_F(WarpgroupCheckTest, AnOperatorCanSwitchThemOff) {
  setenv("GRADWIRE_NO_WARPGROUPS", "1", 1);
  EXPECT_EQ(Description(), "cuda sm_90, 4 multiprocessors, no warpgroups");
}

}  // namespace
}  // namespace gradwire
