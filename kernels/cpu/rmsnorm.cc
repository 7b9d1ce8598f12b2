// SPDX-License-Identifier: Apache-2.0
// Bound by memory: each row is read once from memory and a second time from the
// first-level cache.
#include <cmath>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/softmax_tile.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rmsnorm.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

// delta and sum are null for the plain norm, else sum = x + delta is normed as
// it is stored, rounded to T.
template <class T>
void ForwardRow(const T* x, const T* delta, const T* weight, int64_t hidden,
                float eps, T* sum, T* y, float* rstd) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V squares = hn::Zero(d);
  for (int64_t i = 0; i < hidden; i += lanes) {
    const int64_t n = hidden - i;
    V v = LoadFirst(d, x + i, n);
    if (delta != nullptr) {
      v = hn::Add(v, LoadFirst(d, delta + i, n));
      StoreFirst(d, v, n, sum + i);
      v = LoadFirst(d, sum + i, n);
    }
    squares = hn::MulAdd(v, v, squares);
  }
  const float mean =
      hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(hidden);
  const float r = 1.0f / std::sqrt(mean + eps);
  *rstd = r;
  if (delta != nullptr) x = sum;
  for (int64_t i = 0; i < hidden; i += lanes) {
    const int64_t n = hidden - i;
    const V normed = hn::Mul(LoadFirst(d, x + i, n), hn::Set(d, r));
    StoreFirst(d, hn::Mul(normed, LoadFirst(d, weight + i, n)), n, y + i);
  }
}

template <class T>
void BackwardRow(const T* d_y, const T* x, const T* weight, int64_t hidden,
                 float rstd, T* d_x, float* d_weight) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V r = hn::Set(d, rstd);
  V dot = hn::Zero(d);
  for (int64_t i = 0; i < hidden; i += lanes) {
    const int64_t n = hidden - i;
    const V grad = LoadFirst(d, d_y + i, n);
    const V normed = hn::Mul(LoadFirst(d, x + i, n), r);
    const V product = hn::Mul(grad, normed);
    dot = hn::MulAdd(product, LoadFirst(d, weight + i, n), dot);
    StoreFirst(d, hn::Add(LoadFirst(d, d_weight + i, n), product), n,
               d_weight + i);
  }
  const V mean = hn::Set(
      d, hn::GetLane(hn::SumOfLanes(d, dot)) / static_cast<float>(hidden));
  for (int64_t i = 0; i < hidden; i += lanes) {
    const int64_t n = hidden - i;
    const V g = hn::Mul(LoadFirst(d, d_y + i, n), LoadFirst(d, weight + i, n));
    const V normed = hn::Mul(LoadFirst(d, x + i, n), r);
    const V add = hn::Mul(r, hn::NegMulAdd(normed, mean, g));
    StoreFirst(d, hn::Add(LoadFirst(d, d_x + i, n), add), n, d_x + i);
  }
}

template <class T>
void ForwardRows(const Kernels::AddRmsNorm& args, const Tensor& sum,
                 const Tensor& y, const Tensor& rstd) {
  const int64_t hidden = args.x.dim(1);
  for (int64_t t = 0; t < args.x.dim(0); ++t) {
    const int64_t at = t * hidden;
    const bool add = !args.delta.is_null();
    ForwardRow(args.x.data<T>() + at, add ? args.delta.data<T>() + at : nullptr,
               args.weight.data<T>(), hidden, args.eps,
               add ? sum.data<T>() + at : nullptr, y.data<T>() + at,
               rstd.data<float>() + t);
  }
}

template <class T>
void BackwardRows(const Kernels::RmsNormGrad& args, const Tensor& d_x,
                  float* d_weight) {
  const int64_t hidden = args.x.dim(1);
  for (int64_t t = 0; t < args.x.dim(0); ++t) {
    const int64_t at = t * hidden;
    BackwardRow(args.d_y.data<T>() + at, args.x.data<T>() + at,
                args.weight.data<T>(), hidden, args.rstd.data<float>()[t],
                d_x.data<T>() + at, d_weight);
  }
}

void Forward(const Kernels::AddRmsNorm& args, const Tensor& sum,
             const Tensor& y, const Tensor& rstd) {
  if (args.x.dtype() == DType::kBF16) {
    return ForwardRows<BFloat16>(args, sum, y, rstd);
  }
  ForwardRows<float>(args, sum, y, rstd);
}

void Backward(const Kernels::RmsNormGrad& args, const Tensor& d_x,
              float* d_weight) {
  if (args.x.dtype() == DType::kBF16) {
    return BackwardRows<BFloat16>(args, d_x, d_weight);
  }
  BackwardRows<float>(args, d_x, d_weight);
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

void CpuKernels::RmsNormForward(Stream& stream, const Tensor& x,
                                const Tensor& weight, float eps,
                                const Tensor& y, const Tensor& rstd) {
  AddRmsNormForward(stream, {x, Tensor(), weight, eps}, Tensor(), y, rstd);
}

void CpuKernels::AddRmsNormForward(Stream& stream, const AddRmsNorm& args,
                                   const Tensor& sum, const Tensor& y,
                                   const Tensor& rstd) {
  if (!stream.ok()) return;
  GW_CHECK(args.weight.num_elements() == args.x.dim(1));
  Pool(stream).ParallelFor(args.x.dim(0), 1, [&](int64_t begin, int64_t end) {
    AddRmsNorm rows = args;
    rows.x = args.x.Rows(begin, end);
    const bool add = !args.delta.is_null();
    if (add) rows.delta = args.delta.Rows(begin, end);
    HWY_DYNAMIC_DISPATCH(Forward)
    (rows, add ? sum.Rows(begin, end) : sum, y.Rows(begin, end),
     rstd.Rows(begin, end));
  });
}

// Threads sum d_weight over their rows; the sums are added in their order.
void CpuKernels::RmsNormBackward(Stream& stream, const RmsNormGrad& args,
                                 const Tensor& d_x, const Tensor& d_weight) {
  if (!stream.ok()) return;
  const int64_t tokens = args.x.dim(0), hidden = args.x.dim(1);
  GW_CHECK(d_weight.num_elements() == hidden);
  ThreadPool& pool = Pool(stream);
  const int threads = pool.num_threads();
  scratch_.Reserve(threads, hidden * 4);
  const auto sums = [&](int thread) {
    return reinterpret_cast<float*>(scratch_.part(thread));
  };
  pool.Run([&](int thread) {
    std::fill_n(sums(thread), hidden, 0.0f);
    const int64_t begin = tokens * thread / threads;
    const int64_t end = tokens * (thread + 1) / threads;
    if (begin == end) return;
    RmsNormGrad rows = args;
    rows.d_y = args.d_y.Rows(begin, end);
    rows.x = args.x.Rows(begin, end);
    rows.rstd = args.rstd.Rows(begin, end);
    HWY_DYNAMIC_DISPATCH(Backward)
    (rows, d_x.Rows(begin, end), sums(thread));
  });
  for (int t = 0; t < threads; ++t) {
    AddTo(sums(t), hidden, d_weight.data<float>());
  }
}

}  // namespace gradwire
#endif
