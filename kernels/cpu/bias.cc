// SPDX-License-Identifier: Apache-2.0
// Threads share the columns: each sums whole columns, in the order of tokens.
#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/bias.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;

template <class From, class To>
void AddRow(const From* from, int64_t n, To* to) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += lanes) {
    const auto sum =
        hn::Add(LoadFirst(d, to + i, n - i), LoadFirst(d, from + i, n - i));
    StoreFirst(d, sum, n - i, to + i);
  }
}

template <class T>
void AddToRows(const Tensor& bias, const Tensor& y) {
  const int64_t n = y.dim(1);
  for (int64_t t = 0; t < y.dim(0); ++t) {
    AddRow(bias.data<T>(), n, y.data<T>() + t * n);
  }
}

template <class T>
void SumColumns(const Tensor& d_y, int64_t begin, int64_t end, float* d_bias) {
  const int64_t n = d_y.dim(1);
  for (int64_t t = 0; t < d_y.dim(0); ++t) {
    AddRow(d_y.data<T>() + t * n + begin, end - begin, d_bias + begin);
  }
}

void Forward(const Tensor& bias, const Tensor& y) {
  if (y.dtype() == DType::kBF16) return AddToRows<BFloat16>(bias, y);
  AddToRows<float>(bias, y);
}

void Backward(const Tensor& d_y, int64_t begin, int64_t end, float* d_bias) {
  if (d_y.dtype() == DType::kBF16) {
    return SumColumns<BFloat16>(d_y, begin, end, d_bias);
  }
  SumColumns<float>(d_y, begin, end, d_bias);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(Forward);
HWY_EXPORT(Backward);

}  // namespace

void CpuKernels::BiasForward(Stream& stream, const Tensor& bias,
                             const Tensor& y) {
  if (!stream.ok()) return;
  GW_CHECK(bias.num_elements() == y.dim(1) && bias.dtype() == y.dtype());
  Pool(stream).ParallelFor(y.dim(0), 1, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Forward)(bias, y.Rows(begin, end));
  });
}

void CpuKernels::BiasBackward(Stream& stream, const Tensor& d_y,
                              const Tensor& d_bias) {
  if (!stream.ok()) return;
  GW_CHECK(d_bias.num_elements() == d_y.dim(1));
  constexpr int64_t kCacheLine = 32;  // of bf16, two of float32
  Pool(stream).ParallelFor(d_y.dim(1), kCacheLine,
                           [&](int64_t begin, int64_t end) {
                             HWY_DYNAMIC_DISPATCH(Backward)
                             (d_y, begin, end, d_bias.data<float>());
                           });
}

}  // namespace gradwire
#endif
