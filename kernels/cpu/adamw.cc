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

struct Factors {
  V grad_scale, keep, beta1, beta2, rest1, rest2, rate, correct2, eps;
};

Factors FactorsOf(const AdamWParams& params) {
  const D d;
  const double step = static_cast<double>(params.step);
  const double correct1 = 1.0 / (1.0 - std::pow(double{params.beta1}, step));
  const double correct2 = 1.0 / (1.0 - std::pow(double{params.beta2}, step));
  Factors f;
  f.grad_scale = hn::Set(d, params.grad_scale);
  f.keep = hn::Set(d, 1.0f - params.learning_rate * params.weight_decay);
  f.beta1 = hn::Set(d, params.beta1);
  f.beta2 = hn::Set(d, params.beta2);
  f.rest1 = hn::Set(d, 1.0f - params.beta1);
  f.rest2 = hn::Set(d, 1.0f - params.beta2);
  f.rate = hn::Set(d, static_cast<float>(params.learning_rate * correct1));
  f.correct2 = hn::Set(d, static_cast<float>(correct2));
  f.eps = hn::Set(d, params.eps);
  return f;
}

HWY_INLINE V LoadMaster(const float* weight, const int16_t*) {
  return hn::LoadU(D(), weight);
}
HWY_INLINE V LoadMaster(const BFloat16* weight, const int16_t* low) {
  return LoadHalves(D(), weight, low);
}
HWY_INLINE void StoreMaster(V master, float* weight, int16_t*) {
  hn::StoreU(master, D(), weight);
}
HWY_INLINE void StoreMaster(V master, BFloat16* weight, int16_t* low) {
  StoreHalves(D(), master, weight, low);
}

// Where the elements from some index on lie.
template <class Weight>
struct States {
  Weight* weight;
  int16_t* low;  // null if Weight is float
  float *m, *v, *grad;

  States From(int64_t i) const {
    return {weight + i, low == nullptr ? nullptr : low + i, m + i, v + i,
            grad + i};
  }
};

// One vector of elements.
template <class Weight>
HWY_INLINE void UpdateVector(const Factors& f, const States<Weight>& at) {
  const D d;
  const V g = hn::Mul(hn::LoadU(d, at.grad), f.grad_scale);
  const V m = hn::MulAdd(f.rest1, g, hn::Mul(f.beta1, hn::LoadU(d, at.m)));
  const V v =
      hn::MulAdd(f.rest2, hn::Mul(g, g), hn::Mul(f.beta2, hn::LoadU(d, at.v)));
  const V root = hn::Sqrt(hn::Mul(v, f.correct2));
  const V change = hn::Div(hn::Mul(f.rate, m), hn::Add(root, f.eps));
  const V w = hn::Sub(hn::Mul(LoadMaster(at.weight, at.low), f.keep), change);
  hn::StoreU(m, d, at.m);
  hn::StoreU(v, d, at.v);
  hn::StoreU(hn::Zero(d), d, at.grad);
  StoreMaster(w, at.weight, at.low);
}

// Elements [begin, end).
template <class Weight>
void UpdateAll(const AdamWParams& params, const States<Weight>& states,
               int64_t begin, int64_t end) {
  const Factors factors = FactorsOf(params);
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(D()));
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) UpdateVector(factors, states.From(i));
  if (i == end) return;
  // The last few, in copies as long as a vector.
  constexpr size_t kLanes = hn::MaxLanes(D());
  Weight weight[kLanes] = {};
  int16_t low[kLanes] = {};
  float m[kLanes] = {}, v[kLanes] = {}, grad[kLanes] = {};
  const States<Weight> rest = states.From(i);
  const States<Weight> copy = {weight, rest.low == nullptr ? nullptr : low, m,
                               v, grad};
  const auto move = [n = end - i](const States<Weight>& from,
                                  const States<Weight>& to) {
    std::copy_n(from.weight, n, to.weight);
    if (from.low != nullptr) std::copy_n(from.low, n, to.low);
    std::copy_n(from.m, n, to.m);
    std::copy_n(from.v, n, to.v);
    std::copy_n(from.grad, n, to.grad);
  };
  move(rest, copy);
  UpdateVector(factors, copy);
  move(copy, rest);
}

void Update(const AdamWParams& params, const AdamWTensors& tensors,
            int64_t begin, int64_t end) {
  float* m = tensors.m.data<float>();
  float* v = tensors.v.data<float>();
  float* grad = tensors.grad.data<float>();
  if (tensors.low.is_null()) {
    UpdateAll<float>(params,
                     {tensors.weight.data<float>(), nullptr, m, v, grad}, begin,
                     end);
  } else {
    UpdateAll<BFloat16>(params,
                        {tensors.weight.data<BFloat16>(),
                         tensors.low.data<int16_t>(), m, v, grad},
                        begin, end);
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
  const int64_t n = tensors.weight.num_elements();
  GW_CHECK(tensors.low.is_null() || tensors.low.num_elements() == n);
  GW_CHECK(tensors.m.num_elements() == n && tensors.v.num_elements() == n);
  GW_CHECK(tensors.grad.num_elements() == n && params.step >= 1);
  Pool(stream).ParallelFor(n, kBlock, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Update)(params, tensors, begin, end);
  });
}

}  // namespace gradwire
#endif
