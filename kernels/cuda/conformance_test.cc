// SPDX-License-Identifier: Apache-2.0
// The suite on the CUDA backend: on the emulator, or on a GPU.
#include "kernels/conformance.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/cuda/test_device.h"
#include "kernels/cuda/cuda_kernels.h"

namespace gradwire {
namespace {

std::unique_ptr<Kernels> MakeKernels() {
  auto kernels = NewCudaKernels(*MakeTestDevice());
  GW_CHECK(kernels.ok());
  return *std::move(kernels);
}

// None on a machine without a GPU.
std::vector<KernelsBackend> Backends() {
  if (MakeTestDevice() == nullptr) return {};
  return {{"Cuda", MakeTestDevice, MakeKernels, DType::kF32},
          {"Cuda", MakeTestDevice, MakeKernels, DType::kBF16}};
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(KernelsConformanceTest);
INSTANTIATE_TEST_SUITE_P(
    All, KernelsConformanceTest, testing::ValuesIn(Backends()),
    [](const testing::TestParamInfo<KernelsBackend>& info) {
      return info.param.name + DTypeName(info.param.act);
    });

}  // namespace
}  // namespace gradwire
