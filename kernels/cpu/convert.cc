// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/convert.h"

#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/convert.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;

template <class From, class To>
void Convert(const From* from, int64_t n, To* to) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += lanes) {
    StoreFirst<true>(d, LoadFirst(d, from + i, n - i), n - i, to + i);
  }
}

void NarrowRow(const float* from, int64_t n, BFloat16* to) {
  Convert(from, n, to);
}
void WidenRow(const BFloat16* from, int64_t n, float* to) {
  Convert(from, n, to);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(NarrowRow);
HWY_EXPORT(WidenRow);

}  // namespace

void Narrow(const float* from, int64_t n, BFloat16* to) {
  HWY_DYNAMIC_DISPATCH(NarrowRow)(from, n, to);
}
void Widen(const BFloat16* from, int64_t n, float* to) {
  HWY_DYNAMIC_DISPATCH(WidenRow)(from, n, to);
}

}  // namespace gradwire
#endif
