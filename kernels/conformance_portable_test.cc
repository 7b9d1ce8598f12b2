// SPDX-License-Identifier: Apache-2.0
// The suite on the CPU backend as it runs on lesser machines: with AVX2 alone,
// where bf16 products are widened to f32, and without vector instructions.
#include <oneapi/dnnl/dnnl.h>

#include <memory>
#include <string>
#include <vector>

#include "device/cpu_device.h"
#include "hwy/highway.h"
#include "kernels/conformance.h"
#include "kernels/cpu/cpu_kernels.h"

namespace gradwire {
namespace {

KernelsBackend Restricted(const std::string& name, int64_t targets, DType act) {
  return {name, [] { return std::make_unique<CpuDevice>(2); },
          [targets] {
            // Takes effect before oneDNN's first product in the process; later
            // calls change nothing.
            dnnl_set_max_cpu_isa(dnnl_cpu_isa_avx2);
            hwy::SetSupportedTargetsForTest(targets);
            hwy::GetChosenTarget().Update(hwy::SupportedTargets());
            return NewCpuKernels();
          },
          act};
}

std::vector<KernelsBackend> Backends() {
  return {Restricted("Avx2", HWY_AVX2, DType::kF32),
          Restricted("Avx2", HWY_AVX2, DType::kBF16),
          Restricted("Scalar", HWY_SCALAR, DType::kF32),
          Restricted("Scalar", HWY_SCALAR, DType::kBF16)};
}
std::string NameOf(const testing::TestParamInfo<KernelsBackend>& info) {
  return info.param.name + DTypeName(info.param.act);
}
INSTANTIATE_TEST_SUITE_P(Portable, KernelsConformanceTest,
                         testing::ValuesIn(Backends()), NameOf);
INSTANTIATE_TEST_SUITE_P(Portable, AttentionConformanceTest,
                         testing::ValuesIn(Backends()), NameOf);

TEST(RestrictedTest, TakesEffect) {
  const auto kernels = Restricted("Avx2", HWY_AVX2, DType::kF32).kernels();
  EXPECT_EQ(kernels->description(), "cpu avx2");
  EXPECT_EQ(hwy::SupportedTargets(), HWY_AVX2);
}

}  // namespace
}  // namespace gradwire
