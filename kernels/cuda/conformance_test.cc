// SPDX-License-Identifier: Apache-2.0
// The suite on the CUDA backend: on the emulator, or on a GPU.
#include "kernels/conformance.h"

#include <cstdlib>
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

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(KernelsConformanceTest);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(AttentionConformanceTest);
INSTANTIATE_TEST_SUITE_P(All, KernelsConformanceTest,
                         testing::ValuesIn(Backends()), NameOf);
INSTANTIATE_TEST_SUITE_P(All, AttentionConformanceTest,
                         testing::ValuesIn(AttentionBackends()), NameOf);

}  // namespace
}  // namespace gradwire
