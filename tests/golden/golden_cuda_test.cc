// SPDX-License-Identifier: Apache-2.0
// The golden models on the CUDA backend: on the emulator, or on a GPU.
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "device/cuda/test_device.h"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/golden/golden_suite.h"

namespace gradwire {
namespace {

std::unique_ptr<Kernels> MakeKernels() {
  auto kernels = NewCudaKernels(*MakeTestDevice());
  GW_CHECK(kernels.ok());
  return *std::move(kernels);
}

// None on a machine without a GPU.
std::vector<GoldenBackend> Backends() {
  if (MakeTestDevice() == nullptr) return {};
  return {{"cuda", MakeTestDevice, MakeKernels}};
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GoldenTest);
INSTANTIATE_TEST_SUITE_P(Models, GoldenTest,
                         testing::ValuesIn(GoldenCases(Backends())), CaseName);

}  // namespace
}  // namespace gradwire
