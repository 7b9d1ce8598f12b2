// SPDX-License-Identifier: Apache-2.0
// Bound by memory: one pass reads and writes every state once.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/adamw.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

// Elements [begin, end).
void Update(const AdamWParams& params, const AdamWTensors& tensors,
            int64_t begin, int64_t end) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const double step = static_cast<double>(params.step);
  const V grad_scale = hn::Set(d, params.grad_scale);
  const V keep = hn::Set(d, 1.0f - params.learning_rate * params.weight_decay);
  const V beta1 = hn::Set(d, params.beta1);
  const V beta2 = hn::Set(d, params.beta2);
  const V rest1 = hn::Set(d, 1.0f - params.beta1);
  const V rest2 = hn::Set(d, 1.0f - params.beta2);
  const V rate = hn::Set(
      d, static_cast<float>(params.learning_rate /
                            (1.0 - std::pow(double{params.beta1}, step))));
  const V correct2 = hn::Set(
      d,
      static_cast<float>(1.0 / (1.0 - std::pow(double{params.beta2}, step))));
  const V eps = hn::Set(d, params.eps);
  float* w = tensors.master.data<float>();
  float* m = tensors.m.data<float>();
  float* v = tensors.v.data<float>();
  float* grad = tensors.grad.data<float>();
  BFloat16* weight = tensors.weight.data<BFloat16>();
  for (int64_t i = begin; i < end; i += lanes) {
    const int64_t n = end - i;
    const V g = hn::Mul(LoadFirst(d, grad + i, n), grad_scale);
    const V new_m =
        hn::MulAdd(rest1, g, hn::Mul(beta1, LoadFirst(d, m + i, n)));
    const V new_v = hn::MulAdd(rest2, hn::Mul(g, g),
                               hn::Mul(beta2, LoadFirst(d, v + i, n)));
    const V root = hn::Sqrt(hn::Mul(new_v, correct2));
    const V change = hn::Div(hn::Mul(rate, new_m), hn::Add(root, eps));
    const V new_w = hn::Sub(hn::Mul(LoadFirst(d, w + i, n), keep), change);
    StoreFirst(d, new_m, n, m + i);
    StoreFirst(d, new_v, n, v + i);
    StoreFirst(d, new_w, n, w + i);
    StoreFirst(d, hn::Zero(d), n, grad + i);
    if (weight != nullptr) StoreFirst<true>(d, new_w, n, weight + i);
  }
}

// Sixteen running sums in float64, whatever the vector's width, so that every
// machine adds in the same order.
double SumBlock(const float* x, int64_t n) {
  constexpr int64_t kSums = 16;
  const hn::CappedTag<double, kSums> d;
  const hn::Rebind<float, decltype(d)> df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  HWY_ALIGN double sums[kSums] = {};
  const int64_t whole = n / kSums * kSums;
  for (int64_t i = 0; i < whole; i += kSums) {
    for (int64_t j = 0; j < kSums; j += lanes) {
      const auto v = hn::PromoteTo(d, hn::LoadU(df, x + i + j));
      hn::Store(hn::MulAdd(v, v, hn::Load(d, sums + j)), d, sums + j);
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    sums[i - whole] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(Update);
HWY_EXPORT(SumBlock);

// Elements of one partial sum.
constexpr int64_t kBlock = 1 << 16;

}  // namespace

double CpuKernels::SumOfSquares(Stream& stream, const Tensor& x) {
  if (!stream.ok()) return 0;
  const int64_t n = x.num_elements();
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums(static_cast<size_t>(blocks), 0.0);
  Pool(stream).ParallelFor(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      sums[static_cast<size_t>(b)] = HWY_DYNAMIC_DISPATCH(SumBlock)(
          x.data<float>() + b * kBlock, std::min(kBlock, n - b * kBlock));
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void CpuKernels::AdamW(Stream& stream, const AdamWParams& params,
                       const AdamWTensors& tensors) {
  if (!stream.ok()) return;
  const int64_t n = tensors.master.num_elements();
  GW_CHECK(tensors.m.num_elements() == n && tensors.v.num_elements() == n);
  GW_CHECK(tensors.grad.num_elements() == n && params.step >= 1);
  Pool(stream).ParallelFor(n, kBlock, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Update)(params, tensors, begin, end);
  });
}

}  // namespace gradwire
#endif
