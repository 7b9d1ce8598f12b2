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

template <class T>
float ExpRow(const float* x, int64_t n, float max, T* exps) {
  const D d;
  const V m = hn::Set(d, max);
  const V log2e = hn::Set(d, 1.44269504f);
  V sum = hn::Zero(d);
  ForEachVector(x, n, -INFINITY, [&](int64_t i, V v) HWY_ATTR {
    const V e = SoftmaxExp2(d, hn::Mul(hn::Sub(v, m), log2e));
    sum = hn::Add(sum, e);
    if (exps != nullptr) StoreF32(d, e, exps + i);
  });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

float RowExpImpl(const float* x, int64_t n, float max, DType act, void* exps) {
  return act == DType::kBF16 ? ExpRow(x, n, max, static_cast<BFloat16*>(exps))
                             : ExpRow(x, n, max, static_cast<float*>(exps));
}

template <class T>
void ScaleExps(const T* exps, int64_t n, float factor, T* to) {
  const D d;
  const V f = hn::Set(d, factor);
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(hn::Lanes(d))) {
    StoreF32(d, hn::Mul(f, LoadF32(d, exps + i)), to + i);
  }
}

void RowScaleImpl(const void* exps, int64_t n, float factor, DType act,
                  void* to) {
  if (act == DType::kBF16) {
    ScaleExps(static_cast<const BFloat16*>(exps), n, factor,
              static_cast<BFloat16*>(to));
  } else {
    ScaleExps(static_cast<const float*>(exps), n, factor,
              static_cast<float*>(to));
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {

HWY_EXPORT(RowMaxImpl);
HWY_EXPORT(RowExpImpl);
HWY_EXPORT(RowScaleImpl);

float RowMax(const float* x, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(RowMaxImpl)(x, n);
}

float RowExp(const float* x, int64_t n, float max, DType act, void* exps) {
  return HWY_DYNAMIC_DISPATCH(RowExpImpl)(x, n, max, act, exps);
}

void RowScale(const void* exps, int64_t n, float factor, DType act, void* to) {
  HWY_DYNAMIC_DISPATCH(RowScaleImpl)(exps, n, factor, act, to);
}

}  // namespace gradwire
#endif
