// SPDX-License-Identifier: Apache-2.0
// A float32 master into two halves of 16 bits, and back. Bound by memory; at
// loading and in tests only, since AdamW does both in its own pass.
#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"
#include "kernels/optimizer_state.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/split_master.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

// `low` may be null.
void Split(const float* master, int64_t n, BFloat16* high, int16_t* low) {
  const hn::CappedTag<float, 16> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    StoreHalves(d, hn::LoadU(d, master + i), high + i,
                low == nullptr ? nullptr : low + i);
  }
  for (; i < n; ++i) {
    const Halves halves = SplitHalves(master[i]);
    high[i] = halves.high;
    if (low != nullptr) low[i] = halves.low;
  }
}

void Join(const BFloat16* high, const int16_t* low, int64_t n, float* master) {
  const hn::CappedTag<float, 16> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(LoadHalves(d, high + i, low + i), d, master + i);
  }
  for (; i < n; ++i) master[i] = JoinHalves({high[i], low[i]});
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(Split);
HWY_EXPORT(Join);

// Elements a thread takes at least; less is not worth waking one.
constexpr int64_t kGrain = 4096;

}  // namespace

void CpuKernels::SplitMaster(Stream& stream, const Tensor& master,
                             const Tensor& high, const Tensor& low) {
  if (!stream.ok()) return;
  const int64_t n = master.num_elements();
  GW_CHECK(high.num_elements() == n);
  GW_CHECK(low.is_null() || low.num_elements() == n);
  Pool(stream).ParallelFor(n, kGrain, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Split)
    (master.data<float>() + begin, end - begin, high.data<BFloat16>() + begin,
     low.is_null() ? nullptr : low.data<int16_t>() + begin);
  });
}

void CpuKernels::JoinMaster(Stream& stream, const Tensor& high,
                            const Tensor& low, const Tensor& master) {
  if (!stream.ok()) return;
  const int64_t n = master.num_elements();
  GW_CHECK(high.num_elements() == n && low.num_elements() == n);
  Pool(stream).ParallelFor(n, kGrain, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Join)
    (high.data<BFloat16>() + begin, low.data<int16_t>() + begin, end - begin,
     master.data<float>() + begin);
  });
}

}  // namespace gradwire
#endif
