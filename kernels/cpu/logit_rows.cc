// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/logit_rows.h"

#include <cmath>

#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/logit_rows.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, kRowPadding>;
using V = hn::Vec<D>;

// Calls body(at, vector) for all whole vectors and last for the rest, whose
// lanes beyond the row are `filler`.
template <class Body>
HWY_INLINE void ForEachVector(const float* x, int64_t n, float filler,
                              Body body) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(i, hn::LoadU(d, x + i));
  if (i < n) {
    const auto rest = hn::FirstN(d, static_cast<size_t>(n - i));
    body(i, hn::IfThenElse(rest, hn::LoadU(d, x + i), hn::Set(d, filler)));
  }
}

float RowMaxImpl(const float* x, int64_t n) {
  const D d;
  V max = hn::Set(d, -INFINITY);
  ForEachVector(x, n, -INFINITY,
                [&](int64_t, V v) HWY_ATTR { max = hn::Max(max, v); });
  return hn::GetLane(hn::MaxOfLanes(d, max));
}

float RowSumExpImpl(const float* x, int64_t n, float max) {
  const D d;
  const V m = hn::Set(d, max);
  V sum = hn::Zero(d);
  ForEachVector(x, n, -INFINITY, [&](int64_t, V v) HWY_ATTR {
    sum = hn::Add(sum, SoftmaxExp(d, hn::Sub(v, m)));
  });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

void RowNegativeProbsImpl(float* x, int64_t n, float lse, float factor) {
  const D d;
  const V minus = hn::Set(d, -factor);
  const V l = hn::Set(d, lse);
  ForEachVector(x, n, 0.0f, [&](int64_t i, V v) HWY_ATTR {
    hn::StoreU(hn::Mul(minus, SoftmaxExp(d, hn::Sub(v, l))), d, x + i);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {

HWY_EXPORT(RowMaxImpl);
HWY_EXPORT(RowSumExpImpl);
HWY_EXPORT(RowNegativeProbsImpl);

float RowMax(const float* x, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(RowMaxImpl)(x, n);
}

float RowSumExp(const float* x, int64_t n, float max) {
  return HWY_DYNAMIC_DISPATCH(RowSumExpImpl)(x, n, max);
}

void RowNegativeProbs(float* x, int64_t n, float lse, float factor) {
  HWY_DYNAMIC_DISPATCH(RowNegativeProbsImpl)(x, n, lse, factor);
}

}  // namespace gradwire
#endif
