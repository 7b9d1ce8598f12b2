// SPDX-License-Identifier: Apache-2.0
// The golden models on the CPU backend, and on the definitions of its ops.
#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/reference/reference_kernels.h"
#include "tests/golden/golden_suite.h"

namespace gradwire {
namespace {

std::unique_ptr<Device> MakeDevice() { return std::make_unique<CpuDevice>(2); }

INSTANTIATE_TEST_SUITE_P(Models, GoldenTest,
                         testing::ValuesIn(GoldenCases(
                             {{"cpu", MakeDevice, NewCpuKernels},
                              {"reference", MakeDevice, NewReferenceKernels}})),
                         CaseName);

}  // namespace
}  // namespace gradwire
