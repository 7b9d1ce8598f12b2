// SPDX-License-Identifier: Apache-2.0
// Bound by memory: each head of each token is normed and rotated in one visit.
#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/softmax_tile.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/qk_norm_rope.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

template <class T>
float Rstd(const T* x, int64_t dim, float eps) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  V squares = hn::Zero(d);
  for (int64_t i = 0; i < dim; i += lanes) {
    const V v = LoadFirst(d, x + i, dim - i);
    squares = hn::MulAdd(v, v, squares);
  }
  const float mean =
      hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(dim);
  return 1.0f / std::sqrt(mean + eps);
}

// One head: (x * rstd * weight if weight), then the rotation by +angle or, if
// sign is -1, by -angle. out may be x if weight is null.
template <class T>
HWY_INLINE void RotateHead(const T* x, const T* weight, float rstd,
                           const float* cos, const float* sin, float sign,
                           int64_t dim, T* out) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t half = dim / 2;
  const V r = hn::Set(d, rstd);
  for (int64_t i = 0; i < half; i += lanes) {
    const int64_t n = half - i;
    V a = LoadFirst(d, x + i, n);
    V b = LoadFirst(d, x + half + i, n);
    if (weight != nullptr) {
      a = hn::Mul(hn::Mul(a, r), LoadFirst(d, weight + i, n));
      b = hn::Mul(hn::Mul(b, r), LoadFirst(d, weight + half + i, n));
    }
    const V c = LoadFirst(d, cos + i, n);
    const V s = hn::Mul(LoadFirst(d, sin + i, n), hn::Set(d, sign));
    StoreFirst(d, hn::NegMulAdd(b, s, hn::Mul(a, c)), n, out + i);
    StoreFirst(d, hn::MulAdd(a, s, hn::Mul(b, c)), n, out + half + i);
  }
}

// The norm's backward: `grad` is the gradient of the normed head, d_x the
// result, d_weight f32 [dim] += or null.
template <class T>
void NormHeadBackward(const T* x, const T* weight, float rstd,
                      const float* grad, int64_t dim, T* d_x, float* d_weight) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V r = hn::Set(d, rstd);
  V dot = hn::Zero(d);
  for (int64_t i = 0; i < dim; i += lanes) {
    const int64_t n = dim - i;
    const V product =
        hn::Mul(LoadFirst(d, grad + i, n), hn::Mul(LoadFirst(d, x + i, n), r));
    dot = hn::MulAdd(product, LoadFirst(d, weight + i, n), dot);
    if (d_weight != nullptr) {
      StoreFirst(d, hn::Add(LoadFirst(d, d_weight + i, n), product), n,
                 d_weight + i);
    }
  }
  const V mean =
      hn::Set(d, hn::GetLane(hn::SumOfLanes(d, dot)) / static_cast<float>(dim));
  for (int64_t i = 0; i < dim; i += lanes) {
    const int64_t n = dim - i;
    const V g = hn::Mul(LoadFirst(d, grad + i, n), LoadFirst(d, weight + i, n));
    const V normed = hn::Mul(LoadFirst(d, x + i, n), r);
    StoreFirst(d, hn::Mul(r, hn::NegMulAdd(normed, mean, g)), n, d_x + i);
  }
}

template <class T>
void ForwardTokens(const QkNormRope& args, const Tensor& qkv, int64_t begin,
                   int64_t end, const Tensor& out) {
  const AttentionShape& s = args.shape;
  const int64_t dim = s.head_dim, width = s.QkvWidth();
  const int64_t rotated = s.heads + s.kv_heads;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = qkv.data<T>() + t * width;
    T* y = out.data<T>() + t * width;
    const int64_t angle = args.positions.data<int32_t>()[t] * (dim / 2);
    for (int64_t head = 0; head < rotated; ++head) {
      const Tensor& w = head < s.heads ? args.q_weight : args.k_weight;
      const T* weight = w.data<T>();
      const float rstd =
          weight == nullptr ? 1.0f : Rstd(x + head * dim, dim, args.eps);
      RotateHead(x + head * dim, weight, rstd, args.cos.data<float>() + angle,
                 args.sin.data<float>() + angle, 1.0f, dim, y + head * dim);
    }
    if (x != y) std::copy(x + rotated * dim, x + width, y + rotated * dim);
  }
}

// `room` holds one head in float32, then sums of d_q_weight and
// d_k_weight, each f32 [head_dim].
template <class T>
void BackwardTokens(const QkNormRope& args, const Kernels::QkNormRopeGrad& grad,
                    int64_t begin, int64_t end, float* room,
                    const Tensor& d_qkv) {
  const AttentionShape& s = args.shape;
  const int64_t dim = s.head_dim, width = s.QkvWidth();
  const int64_t rotated = s.heads + s.kv_heads;
  for (int64_t t = begin; t < end; ++t) {
    const T* from = grad.d_out.data<T>() + t * width;
    T* to = d_qkv.data<T>() + t * width;
    const int64_t angle = args.positions.data<int32_t>()[t] * (dim / 2);
    const float* cos = args.cos.data<float>() + angle;
    const float* sin = args.sin.data<float>() + angle;
    for (int64_t head = 0; head < rotated; ++head) {
      const bool is_q = head < s.heads;
      const Tensor& w = is_q ? args.q_weight : args.k_weight;
      if (w.is_null()) {
        RotateHead<T>(from + head * dim, nullptr, 1.0f, cos, sin, -1.0f, dim,
                      to + head * dim);
        continue;
      }
      // The rotated gradient stays in float32 on its way through the norm.
      for (int64_t i = 0; i < dim; ++i) {
        room[i] = static_cast<float>(from[head * dim + i]);
      }
      RotateHead<float>(room, nullptr, 1.0f, cos, sin, -1.0f, dim, room);
      const T* x = grad.qkv.data<T>() + t * width + head * dim;
      const Tensor& d_w = is_q ? grad.d_q_weight : grad.d_k_weight;
      NormHeadBackward(x, w.data<T>(), Rstd(x, dim, args.eps), room, dim,
                       to + head * dim,
                       d_w.is_null() ? nullptr : room + (is_q ? 1 : 2) * dim);
    }
    if (from != to) {
      std::copy(from + rotated * dim, from + width, to + rotated * dim);
    }
  }
}

void Forward(const QkNormRope& args, const Tensor& qkv, int64_t begin,
             int64_t end, const Tensor& out) {
  if (qkv.dtype() == DType::kBF16) {
    return ForwardTokens<BFloat16>(args, qkv, begin, end, out);
  }
  ForwardTokens<float>(args, qkv, begin, end, out);
}

void Backward(const QkNormRope& args, const Kernels::QkNormRopeGrad& grad,
              int64_t begin, int64_t end, float* room, const Tensor& d_qkv) {
  if (d_qkv.dtype() == DType::kBF16) {
    return BackwardTokens<BFloat16>(args, grad, begin, end, room, d_qkv);
  }
  BackwardTokens<float>(args, grad, begin, end, room, d_qkv);
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

void CpuKernels::QkNormRopeForward(Stream& stream, const QkNormRope& args,
                                   const Tensor& qkv, const Tensor& out) {
  if (!stream.ok()) return;
  GW_CHECK(qkv.dim(1) == args.shape.QkvWidth() && out.dim(1) == qkv.dim(1));
  GW_CHECK(args.shape.head_dim % 2 == 0);
  Pool(stream).ParallelFor(qkv.dim(0), 1, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Forward)(args, qkv, begin, end, out);
  });
}

// Threads sum the weights' gradients over their tokens; the sums are added in
// the order of the threads.
void CpuKernels::QkNormRopeBackward(Stream& stream, const QkNormRope& args,
                                    const QkNormRopeGrad& grad,
                                    const Tensor& d_qkv) {
  if (!stream.ok()) return;
  const int64_t tokens = d_qkv.dim(0), dim = args.shape.head_dim;
  GW_CHECK(d_qkv.dim(1) == args.shape.QkvWidth() && dim % 2 == 0);
  ThreadPool& pool = Pool(stream);
  const int threads = pool.num_threads();
  scratch_.Reserve(threads, 3 * dim * 4);
  const auto room = [&](int thread) {
    return reinterpret_cast<float*>(scratch_.part(thread));
  };
  pool.Run([&](int thread) {
    std::fill_n(room(thread), 3 * dim, 0.0f);
    HWY_DYNAMIC_DISPATCH(Backward)
    (args, grad, tokens * thread / threads, tokens * (thread + 1) / threads,
     room(thread), d_qkv);
  });
  for (int t = 0; t < threads; ++t) {
    if (!grad.d_q_weight.is_null()) {
      AddTo(room(t) + dim, dim, grad.d_q_weight.data<float>());
    }
    if (!grad.d_k_weight.is_null()) {
      AddTo(room(t) + 2 * dim, dim, grad.d_k_weight.data<float>());
    }
  }
}

}  // namespace gradwire
#endif
