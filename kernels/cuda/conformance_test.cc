// SPDX-License-Identifier: Apache-2.0
// The suite on the CUDA backend: on the emulator, or on a GPU.
#include "kernels/conformance.h"

#include <memory>
#include <utility>

#include "device/cuda/cuda_device.h"
#include "kernels/cuda/cuda_kernels.h"

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

INSTANTIATE_TEST_SUITE_P(
    Cuda, KernelsConformanceTest,
    testing::Values(
        KernelsBackend{"Cuda", MakeDevice, MakeKernels, DType::kF32},
        KernelsBackend{"Cuda", MakeDevice, MakeKernels, DType::kBF16}),
    [](const testing::TestParamInfo<KernelsBackend>& info) {
      return std::string(info.param.name) + DTypeName(info.param.act);
    });

}  // namespace
}  // namespace gradwire
