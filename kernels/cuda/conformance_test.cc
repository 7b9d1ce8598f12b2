// SPDX-License-Identifier: Apache-2.0
// The suite on the CUDA backend: on the emulator, or on a GPU.
#include "kernels/conformance.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/cuda/test_device.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/warpgroup_check.h"

namespace gradwire {
namespace {

std::unique_ptr<Kernels> MakeKernels() {
  auto kernels = NewCudaKernels(*MakeTestDevice());
  GW_CHECK(kernels.ok());
  return *std::move(kernels);
}

// As on a GPU whose products of warpgroups fail their check.
std::unique_ptr<Kernels> MakeKernelsOfWarps() {
  setenv("GRADWIRE_NO_WARPGROUPS", "1", 1);
  std::unique_ptr<Kernels> kernels = MakeKernels();
  unsetenv("GRADWIRE_NO_WARPGROUPS");
  return kernels;
}

// None on a machine without a GPU.
std::vector<KernelsBackend> Backends() {
  if (MakeTestDevice() == nullptr) return {};
  return {{"Cuda", MakeTestDevice, MakeKernels, DType::kF32},
          {"Cuda", MakeTestDevice, MakeKernels, DType::kBF16}};
}
std::vector<KernelsBackend> AttentionBackends() {
  std::vector<KernelsBackend> backends = Backends();
  if (backends.empty()) return {};
  backends.push_back(
      {"CudaOfWarps", MakeTestDevice, MakeKernelsOfWarps, DType::kBF16});
  return backends;
}

std::string NameOf(const testing::TestParamInfo<KernelsBackend>& info) {
  return info.param.name + DTypeName(info.param.act);
}

// Or the suite would say nothing of them, there where it matters.
TEST(WarpgroupsTest, AreUsedOnHopper) {
  const auto device = MakeTestDevice();
  if (device == nullptr) GTEST_SKIP();
  const std::string description = MakeKernels()->description();
  std::printf("kernels: %s\n", description.c_str());
  if (!description.starts_with("cuda sm_90")) GTEST_SKIP() << "another GPU";
  const auto room = device->Allocate(kWarpgroupCheckFloats * sizeof(float));
  ASSERT_TRUE(room.ok());
  WarpgroupCheck check;
  ASSERT_EQ(CheckWarpgroups(static_cast<float*>((*room)->data()), check),
            cudaSuccess);
  EXPECT_EQ(check.by_rows, 0);
  EXPECT_EQ(check.by_rows_64, 0);
  EXPECT_EQ(check.by_columns, 0);
  EXPECT_EQ(check.by_columns_64, 0);
  EXPECT_FALSE(description.ends_with("no warpgroups")) << description;
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(KernelsConformanceTest);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(AttentionConformanceTest);
INSTANTIATE_TEST_SUITE_P(All, KernelsConformanceTest,
                         testing::ValuesIn(Backends()), NameOf);
INSTANTIATE_TEST_SUITE_P(All, AttentionConformanceTest,
                         testing::ValuesIn(AttentionBackends()), NameOf);

}  // namespace
}  // namespace gradwire
