// SPDX-License-Identifier: Apache-2.0
// Bound by memory: one pass over the rows, nothing kept.
#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/swiglu.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

// x [gate | up] of one token.
template <class T>
void ForwardRow(const T* x, int64_t ffn, T* y) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < ffn; i += lanes) {
    const int64_t n = ffn - i;
    const V gate = LoadFirst(d, x + i, n);
    const V up = LoadFirst(d, x + ffn + i, n);
    StoreFirst(d, hn::Mul(hn::Mul(gate, Sigmoid(d, gate)), up), n, y + i);
  }
}

// d_x may be x: each vector is read before it is written. y may be null.
template <class T>
void BackwardRow(const T* x, const T* d_y, int64_t ffn, T* d_x, T* y) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V one = hn::Set(d, 1.0f);
  for (int64_t i = 0; i < ffn; i += lanes) {
    const int64_t n = ffn - i;
    const V gate = LoadFirst(d, x + i, n);
    const V up = LoadFirst(d, x + ffn + i, n);
    const V grad = LoadFirst(d, d_y + i, n);
    const V s = Sigmoid(d, gate);
    const V silu = hn::Mul(gate, s);
    // 1 + gate (1 - s)
    const V slope = hn::MulAdd(gate, hn::Sub(one, s), one);
    const V d_gate = hn::Mul(hn::Mul(grad, up), hn::Mul(s, slope));
    StoreFirst(d, d_gate, n, d_x + i);
    StoreFirst(d, hn::Mul(grad, silu), n, d_x + ffn + i);
    if (y != nullptr) StoreFirst(d, hn::Mul(silu, up), n, y + i);
  }
}

template <class T>
void ForwardRows(const Tensor& x, const Tensor& y) {
  const int64_t ffn = y.dim(1);
  for (int64_t t = 0; t < x.dim(0); ++t) {
    ForwardRow(x.data<T>() + t * 2 * ffn, ffn, y.data<T>() + t * ffn);
  }
}

template <class T>
void BackwardRows(const Tensor& x, const Tensor& d_y, const Tensor& d_x,
                  const Tensor& y) {
  const int64_t ffn = d_y.dim(1);
  for (int64_t t = 0; t < x.dim(0); ++t) {
    BackwardRow(x.data<T>() + t * 2 * ffn, d_y.data<T>() + t * ffn, ffn,
                d_x.data<T>() + t * 2 * ffn,
                y.is_null() ? nullptr : y.data<T>() + t * ffn);
  }
}

void Forward(const Tensor& x, const Tensor& y) {
  if (x.dtype() == DType::kBF16) return ForwardRows<BFloat16>(x, y);
  ForwardRows<float>(x, y);
}

void Backward(const Tensor& x, const Tensor& d_y, const Tensor& d_x,
              const Tensor& y) {
  if (x.dtype() == DType::kBF16) return BackwardRows<BFloat16>(x, d_y, d_x, y);
  BackwardRows<float>(x, d_y, d_x, y);
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

void CpuKernels::SwiGluForward(Stream& stream, const Tensor& x,
                               const Tensor& y) {
  if (!stream.ok()) return;
  GW_CHECK(x.dim(1) == 2 * y.dim(1) && y.dim(0) == x.dim(0));
  Pool(stream).ParallelFor(x.dim(0), 1, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Forward)(x.Rows(begin, end), y.Rows(begin, end));
  });
}

void CpuKernels::SwiGluBackward(Stream& stream, const Tensor& x,
                                const Tensor& d_y, const Tensor& d_x,
                                const Tensor& y) {
  if (!stream.ok()) return;
  GW_CHECK(x.dim(1) == 2 * d_y.dim(1) && d_x.dim(1) == x.dim(1));
  Pool(stream).ParallelFor(x.dim(0), 1, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Backward)
    (x.Rows(begin, end), d_y.Rows(begin, end), d_x.Rows(begin, end),
     y.is_null() ? y : y.Rows(begin, end));
  });
}

}  // namespace gradwire
#endif
