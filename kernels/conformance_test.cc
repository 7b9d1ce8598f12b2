// SPDX-License-Identifier: Apache-2.0
// The suite on the reference itself and on the CPU backend, and a test of the
// checker.
#include "kernels/conformance.h"

#include <memory>
#include <string>
#include <vector>

#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/reference/reference_kernels.h"

namespace gradwire {
namespace {

std::vector<KernelsBackend> Backends() {
  std::vector<KernelsBackend> backends;
  for (const DType act : {DType::kF32, DType::kBF16}) {
    backends.push_back({"Reference",
                        [] { return std::make_unique<CpuDevice>(1); },
                        NewReferenceKernels, act});
    for (const int threads : {1, 2, 5}) {
      backends.push_back(
          {"Cpu" + std::to_string(threads),
           [threads] { return std::make_unique<CpuDevice>(threads); },
           NewCpuKernels, act});
    }
  }
  return backends;
}

std::string NameOf(const testing::TestParamInfo<KernelsBackend>& info) {
  return info.param.name + DTypeName(info.param.act);
}
INSTANTIATE_TEST_SUITE_P(All, KernelsConformanceTest,
                         testing::ValuesIn(Backends()), NameOf);
INSTANTIATE_TEST_SUITE_P(All, AttentionConformanceTest,
                         testing::ValuesIn(Backends()), NameOf);

TEST(CompareWithinTest, OneWrongElementFailsAndIsNamed) {
  std::vector<float> got = {1.0f, 2.0f, 3.0f};
  const Tensor tensor(got.data(), DType::kF32, {3});
  const std::vector<Tracked> want = {1.0, {2.0, 1e-6}, 3.0};
  EXPECT_EQ(CompareWithin(tensor, want), "");
  got[1] = 2.00001f;
  EXPECT_NE(CompareWithin(tensor, want).find("element 1 of f32[3]"),
            std::string::npos);
  got[1] = 2.0f;
  got[2] = NAN;
  EXPECT_NE(CompareWithin(tensor, want).find("element 2"), std::string::npos);
  got[2] = 3.0000005f;  // two units in the last place
  EXPECT_NE(CompareWithin(tensor, want), "");
}

TEST(CompareWithinTest, AMissingElementFails) {
  std::vector<float> got = {1.0f, 2.0f};
  EXPECT_NE(CompareWithin(Tensor(got.data(), DType::kF32, {2}), {1.0}), "");
}

TEST(TrackedTest, BoundsGrowWithTheWork) {
  Sum<Tracked> few, many;
  for (int i = 0; i < 10; ++i) few.Add(Tracked(1.0));
  for (int i = 0; i < 1000; ++i) many.Add(Tracked(0.01));
  EXPECT_GT(many.Total().error, few.Total().error);
  EXPECT_GT(Exp(Tracked(3, 1e-3)).error, std::exp(3.0) * 1e-3);
  EXPECT_EQ(MayRound(DType::kBF16, Tracked(1.0)).error, 1.0 / 256);
}

}  // namespace
}  // namespace gradwire
