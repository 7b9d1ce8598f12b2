// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/kernels/ceilings.h"

#include <algorithm>
#include <memory>

#include "base/check.h"
#include "benchmarks/kernels/fill.h"
#include "benchmarks/kernels/timing.h"
#include "device/arena.h"

namespace gradwire {
namespace {

constexpr int kRounds = 7;

double BestGemm(CpuDevice& device, Kernels& kernels, DType act) {
  std::unique_ptr<Stream> stream = device.NewStream();
  double best = 0;
  for (const int64_t n : {512, 1024, 2048}) {
    auto arena = Arena::Create(device, 3 * (n * n * 4 + Arena::kAlignment));
    GW_CHECK(arena.ok());
    const Tensor x = arena->Alloc("x", act, {n, n});
    const Tensor w = arena->Alloc("w", act, {n, n});
    const Tensor y = arena->Alloc("y", act, {n, n});
    FillNormal(x, 1.0f);
    FillNormal(w, 1.0f);
    for (const bool input : {false, true}) {
      const Timing t = Time(
          [&](int) {
            if (input) {
              kernels.MatmulBackwardInput(*stream, x, w, y, false);
            } else {
              kernels.MatmulForward(*stream, x, w, y, false);
            }
          },
          kRounds, 0.02);
      best = std::max(best, 2.0 * static_cast<double>(n * n * n) / t.min);
    }
  }
  return best;
}

double BestTriad(CpuDevice& device) {
  constexpr int64_t kElements = int64_t{32} << 20;  // far beyond any cache
  auto arena = Arena::Create(device, 3 * (kElements * 4 + Arena::kAlignment));
  GW_CHECK(arena.ok());
  float* a = arena->Alloc("a", DType::kF32, {kElements}).data<float>();
  float* b = arena->Alloc("b", DType::kF32, {kElements}).data<float>();
  float* c = arena->Alloc("c", DType::kF32, {kElements}).data<float>();
  const Timing t = Time(
      [&](int) {
        device.pool().ParallelFor(kElements, 1024,
                                  [&](int64_t begin, int64_t end) {
                                    for (int64_t i = begin; i < end; ++i) {
                                      a[i] = b[i] + 0.5f * c[i];
                                    }
                                  });
      },
      kRounds, 0.0);
  return 12.0 * kElements / t.min;
}

}  // namespace

Ceilings MeasureCeilings(CpuDevice& device, Kernels& kernels, DType act) {
  return {BestGemm(device, kernels, act), BestTriad(device)};
}

}  // namespace gradwire
