// SPDX-License-Identifier: Apache-2.0
#include "base/status.h"
#include "benchmarks/checkpoint/saves.h"
#include "kernels/cpu/cpu_kernels.h"

namespace gradwire {
namespace {

absl::Status Main() {
  const auto device = LocalStep::NewDevice();
  const auto kernels = NewCpuKernels();
  GW_ASSIGN_OR_RETURN(LocalStep step, LocalStep::Create(*device, *kernels));
  return RunSaves(step, kernels->description(), device->pool().num_threads());
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  return gradwire::RunProgram(argc, argv, gradwire::Main);
}
