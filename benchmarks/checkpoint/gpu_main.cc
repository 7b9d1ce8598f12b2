// SPDX-License-Identifier: Apache-2.0
#include <memory>

#include "base/status.h"
#include "benchmarks/checkpoint/saves.h"
#include "device/cuda/cuda_device.h"
#include "kernels/cuda/cuda_kernels.h"

namespace gradwire {
namespace {

absl::Status Main() {
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<CudaDevice> device,
                      CudaDevice::Create(0));
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<Kernels> kernels,
                      NewCudaKernels(*device));
  GW_ASSIGN_OR_RETURN(LocalStep step, LocalStep::Create(*device, *kernels));
  return RunSaves(step, kernels->description(), 0);
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  return gradwire::RunProgram(argc, argv, gradwire::Main);
}
