// SPDX-License-Identifier: Apache-2.0
// The golden models on the CUDA backend: on the emulator, or on a GPU.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>

#include "base/check.h"
#include "device/cuda/cuda_device.h"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/golden/golden_suite.h"

namespace gradwire {
namespace {

std::unique_ptr<CudaDevice> MakeDevice() {
  auto device = CudaDevice::Create(0);
  GW_CHECK(device.ok());
  return *std::move(device);
}

std::unique_ptr<Kernels> MakeKernels() {
  auto kernels = NewCudaKernels(*MakeDevice());
  GW_CHECK(kernels.ok());
  return *std::move(kernels);
}

// None on a machine without a GPU.
std::vector<GoldenBackend> Backends() {
  const auto device = CudaDevice::Create(0);
  if (!device.ok()) {
    std::printf("skipped: %s\n",
                std::string(device.status().message()).c_str());
    return {};
  }
  return {{"cuda", MakeDevice, MakeKernels}};
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GoldenTest);
INSTANTIATE_TEST_SUITE_P(Models, GoldenTest,
                         testing::ValuesIn(GoldenCases(Backends())), CaseName);

}  // namespace
}  // namespace gradwire
