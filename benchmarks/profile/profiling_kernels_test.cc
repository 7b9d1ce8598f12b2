// SPDX-License-Identifier: Apache-2.0
// Every op arrives, and is counted with the work it is.
#include "benchmarks/profile/profiling_kernels.h"

#include <vector>

#include "device/cpu_device.h"
#include "kernels/conformance.h"
#include "kernels/cpu/cpu_kernels.h"

namespace gradwire {
namespace {

const KernelsBackend kBackend = {
    "Profiling", [] { return std::make_unique<CpuDevice>(2); },
    [] { return std::make_unique<ProfilingKernels>(NewCpuKernels()); },
    DType::kF32};
std::string NameOf(const testing::TestParamInfo<KernelsBackend>& info) {
  return info.param.name;
}
INSTANTIATE_TEST_SUITE_P(Profiling, KernelsConformanceTest,
                         testing::Values(kBackend), NameOf);
INSTANTIATE_TEST_SUITE_P(Profiling, AttentionConformanceTest,
                         testing::Values(kBackend), NameOf);

TEST(ProfilingKernelsTest, CountsCallsAndWorkByShape) {
  CpuDevice device(1);
  const std::unique_ptr<Stream> stream = device.NewStream();
  ProfilingKernels kernels(NewCpuKernels());
  std::vector<float> x(4 * 8), x2(4 * 8), w(16 * 8), y(4 * 16), d_w(16 * 8);
  const Tensor tx(x.data(), DType::kF32, {4, 8});
  const Tensor tw(w.data(), DType::kF32, {16, 8});
  const Tensor ty(y.data(), DType::kF32, {4, 16});
  const Tensor td(d_w.data(), DType::kF32, {16, 8});
  for (int i = 0; i < 3; ++i) {
    kernels.MatmulForward(*stream, tx, tw, ty, false);
  }
  kernels.MatmulBackwardWeight(*stream, ty, tx, {td});
  kernels.Add(*stream, tx, Tensor(x2.data(), DType::kF32, {4, 8}));

  auto totals = kernels.TakeTotals();
  ASSERT_EQ(totals.size(), 3u);
  const OpTotal& forward = totals["matmul_forward 16x8"];
  EXPECT_EQ(forward.calls, 3);
  EXPECT_EQ(forward.work.flops, 3 * 2 * 4 * 8 * 16);
  EXPECT_EQ(forward.work.bytes, 3 * 4 * (4 * 8 + 16 * 8 + 4 * 16));
  EXPECT_GT(forward.seconds, 0);
  const OpTotal& weight = totals["matmul_backward_weight 16x8"];
  EXPECT_EQ(weight.work.flops, 2 * 4 * 8 * 16);
  EXPECT_EQ(weight.work.bytes, 4 * (4 * 8 + 4 * 16 + 2 * 16 * 8));
  EXPECT_EQ(totals["add"].work.bytes, 4 * 3 * 4 * 8);
  EXPECT_TRUE(kernels.TakeTotals().empty());
}

}  // namespace
}  // namespace gradwire
