// SPDX-License-Identifier: Apache-2.0
// Definitions of RMSNorm, QK-norm with RoPE, SwiGLU, AdamW and the digest of
// its state.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/optimizer_state.h"
#include "kernels/reference/linear.h"
#include "kernels/reference/number.h"
#include "kernels/state_digest.h"

namespace gradwire::reference {

// x + delta as it is stored: an exact sum, rounded to float32, then to act.
inline double AddRounded(DType act, double x, double delta) {
  const float sum = static_cast<float>(x + delta);
  return act == DType::kBF16
             ? static_cast<double>(static_cast<float>(BFloat16(sum)))
             : static_cast<double>(sum);
}

// 1 / sqrt(mean(x^2) + eps) of one row.
template <class Num>
Num Rstd(const double* x, int64_t n, float eps) {
  Sum<Num> squares;
  for (int64_t i = 0; i < n; ++i) squares.Add(Num(x[i]) * Num(x[i]));
  return Reciprocal(Sqrt(squares.Total() * Num(1.0 / static_cast<double>(n)) +
                         Num(double{eps})));
}

// The gradient of one normed row, x and of the weight.
template <class Num>
void RmsNormRowBackward(const Num* d_y, const double* x, const double* weight,
                        const Num& rstd, int64_t n, Num* d_x,
                        Sum<Num>* d_weight) {
  Sum<Num> dot;
  for (int64_t i = 0; i < n; ++i) {
    const Num normed = Num(x[i]) * rstd;
    dot.Add(d_y[i] * Num(weight[i]) * normed);
    if (d_weight != nullptr) d_weight[i].Add(d_y[i] * normed);
  }
  const Num mean = dot.Total() * Num(1.0 / static_cast<double>(n));
  for (int64_t i = 0; i < n; ++i) {
    d_x[i] = rstd * (d_y[i] * Num(weight[i]) - Num(x[i]) * rstd * mean);
  }
}

inline std::vector<double> Row(const Tensor& t, int64_t at, int64_t n) {
  std::vector<double> row;
  for (int64_t i = 0; i < n; ++i) row.push_back(At(t, at + i));
  return row;
}

template <class Num>
struct NormResult {
  Result<Num> y, rstd;
};
template <class Num>
NormResult<Num> RmsNormForward(const Tensor& x, const Tensor& weight,
                               float eps) {
  const int64_t hidden = x.dim(1);
  NormResult<Num> result;
  for (int64_t t = 0; t < x.dim(0); ++t) {
    const std::vector<double> row = Row(x, t * hidden, hidden);
    const Num rstd = Rstd<Num>(row.data(), hidden, eps);
    result.rstd.push_back(rstd);
    for (int64_t i = 0; i < hidden; ++i) {
      result.y.push_back(Num(row[static_cast<size_t>(i)]) * rstd *
                         Num(At(weight, i)));
    }
  }
  return result;
}

template <class Num>
struct NormGradResult {
  Result<Num> d_x, d_weight;
};
template <class Num>
NormGradResult<Num> RmsNormBackward(const Kernels::RmsNormGrad& args,
                                    const Tensor& d_x, const Tensor& d_weight) {
  const int64_t hidden = args.x.dim(1);
  NormGradResult<Num> result;
  std::vector<Sum<Num>> sums(static_cast<size_t>(hidden));
  const std::vector<double> weight = Row(args.weight, 0, hidden);
  for (int64_t i = 0; i < hidden; ++i) {
    sums[static_cast<size_t>(i)].Add(At(d_weight, i));
  }
  for (int64_t t = 0; t < args.x.dim(0); ++t) {
    const std::vector<double> x = Row(args.x, t * hidden, hidden);
    std::vector<Num> d_y, row(static_cast<size_t>(hidden));
    for (int64_t i = 0; i < hidden; ++i) {
      d_y.push_back(At(args.d_y, t * hidden + i));
    }
    RmsNormRowBackward<Num>(d_y.data(), x.data(), weight.data(),
                            At(args.rstd, t), hidden, row.data(), sums.data());
    for (int64_t i = 0; i < hidden; ++i) {
      result.d_x.push_back(Num(At(d_x, t * hidden + i)) +
                           row[static_cast<size_t>(i)]);
    }
  }
  for (const Sum<Num>& sum : sums) result.d_weight.push_back(sum.Total());
  return result;
}

template <class Num>
Result<Num> QkNormRopeForward(const QkNormRope& args, const Tensor& qkv) {
  const AttentionShape& s = args.shape;
  const int64_t dim = s.head_dim, half = dim / 2, width = s.QkvWidth();
  Result<Num> result = Start<Num>(qkv, true);
  for (int64_t t = 0; t < qkv.dim(0); ++t) {
    const int64_t angle = args.positions.data<int32_t>()[t] * half;
    for (int64_t head = 0; head < s.heads + s.kv_heads; ++head) {
      const Tensor& w = head < s.heads ? args.q_weight : args.k_weight;
      const int64_t at = t * width + head * dim;
      const std::vector<double> x = Row(qkv, at, dim);
      std::vector<Num> n(x.begin(), x.end());
      if (!w.is_null()) {
        const Num rstd = Rstd<Num>(x.data(), dim, args.eps);
        for (int64_t i = 0; i < dim; ++i) {
          n[static_cast<size_t>(i)] =
              n[static_cast<size_t>(i)] * rstd * Num(At(w, i));
        }
      }
      for (int64_t i = 0; i < half; ++i) {
        const Num a = n[static_cast<size_t>(i)];
        const Num b = n[static_cast<size_t>(i + half)];
        const Num cos = At(args.cos, angle + i), sin = At(args.sin, angle + i);
        result[static_cast<size_t>(at + i)] = a * cos - b * sin;
        result[static_cast<size_t>(at + half + i)] = b * cos + a * sin;
      }
    }
  }
  return result;
}

template <class Num>
struct RopeGradResult {
  Result<Num> d_qkv, d_q_weight, d_k_weight;
};
template <class Num>
RopeGradResult<Num> QkNormRopeBackward(const QkNormRope& args,
                                       const Kernels::QkNormRopeGrad& grad) {
  const AttentionShape& s = args.shape;
  const int64_t dim = s.head_dim, half = dim / 2, width = s.QkvWidth();
  RopeGradResult<Num> result;
  result.d_qkv = Start<Num>(grad.d_out, true);
  std::vector<Sum<Num>> q_sums(static_cast<size_t>(dim)), k_sums = q_sums;
  for (int64_t i = 0; i < dim; ++i) {
    const size_t at = static_cast<size_t>(i);
    if (!grad.d_q_weight.is_null()) q_sums[at].Add(At(grad.d_q_weight, i));
    if (!grad.d_k_weight.is_null()) k_sums[at].Add(At(grad.d_k_weight, i));
  }
  for (int64_t t = 0; t < grad.d_out.dim(0); ++t) {
    const int64_t angle = args.positions.data<int32_t>()[t] * half;
    for (int64_t head = 0; head < s.heads + s.kv_heads; ++head) {
      const bool is_q = head < s.heads;
      const Tensor& w = is_q ? args.q_weight : args.k_weight;
      const int64_t at = t * width + head * dim;
      std::vector<Num> g(static_cast<size_t>(dim));
      for (int64_t i = 0; i < half; ++i) {
        const Num a = At(grad.d_out, at + i), b = At(grad.d_out, at + half + i);
        const Num cos = At(args.cos, angle + i), sin = At(args.sin, angle + i);
        g[static_cast<size_t>(i)] = a * cos + b * sin;
        g[static_cast<size_t>(i + half)] = b * cos - a * sin;
      }
      Num* d_x = result.d_qkv.data() + at;
      if (w.is_null()) {
        std::copy(g.begin(), g.end(), d_x);
        continue;
      }
      const std::vector<double> x = Row(grad.qkv, at, dim);
      const std::vector<double> weight = Row(w, 0, dim);
      RmsNormRowBackward<Num>(g.data(), x.data(), weight.data(),
                              Rstd<Num>(x.data(), dim, args.eps), dim, d_x,
                              is_q ? q_sums.data() : k_sums.data());
    }
  }
  for (const Sum<Num>& sum : q_sums) result.d_q_weight.push_back(sum.Total());
  for (const Sum<Num>& sum : k_sums) result.d_k_weight.push_back(sum.Total());
  return result;
}

template <class Num>
Result<Num> SwiGluForward(const Tensor& x) {
  const int64_t ffn = x.dim(1) / 2;
  Result<Num> result;
  for (int64_t t = 0; t < x.dim(0); ++t) {
    for (int64_t i = 0; i < ffn; ++i) {
      const Num gate = At(x, t * 2 * ffn + i),
                up = At(x, t * 2 * ffn + ffn + i);
      result.push_back(gate * Sigmoid(gate) * up);
    }
  }
  return result;
}

template <class Num>
Result<Num> SwiGluBackward(const Tensor& x, const Tensor& d_y) {
  const int64_t ffn = d_y.dim(1);
  Result<Num> result(static_cast<size_t>(x.num_elements()));
  for (int64_t t = 0; t < x.dim(0); ++t) {
    for (int64_t i = 0; i < ffn; ++i) {
      const int64_t at = t * 2 * ffn + i;
      const Num gate = At(x, at), up = At(x, at + ffn);
      const Num grad = At(d_y, t * ffn + i), s = Sigmoid(gate);
      result[static_cast<size_t>(at)] =
          grad * up * s * (Num(1) + gate * (Num(1) - s));
      result[static_cast<size_t>(at + ffn)] = grad * gate * s;
    }
  }
  return result;
}

inline double Master(const AdamWTensors& tensors, int64_t i) {
  if (tensors.low.is_null()) return At(tensors.weight, i);
  return double{JoinHalves(
      {tensors.weight.data<BFloat16>()[i], tensors.low.data<int16_t>()[i]})};
}

template <class Num>
struct AdamWResult {
  Result<Num> master, m, v;
};
template <class Num>
AdamWResult<Num> AdamW(const AdamWParams& p, const AdamWTensors& tensors) {
  const double step = static_cast<double>(p.step);
  const double lr = double{p.learning_rate};
  const double correct1 = 1 / (1 - std::pow(double{p.beta1}, step));
  const double correct2 = 1 / (1 - std::pow(double{p.beta2}, step));
  AdamWResult<Num> result;
  for (int64_t i = 0; i < tensors.weight.num_elements(); ++i) {
    const Num g = Num(At(tensors.grad, i)) * Num(double{p.grad_scale});
    const Num m = Num(double{p.beta1}) * Num(At(tensors.m, i)) +
                  (Num(1) - Num(double{p.beta1})) * g;
    const Num v = Num(double{p.beta2}) * Num(At(tensors.v, i)) +
                  (Num(1) - Num(double{p.beta2})) * g * g;
    const Num w = Num(Master(tensors, i)) *
                  (Num(1) - Num(lr) * Num(double{p.weight_decay}));
    const Num root = Sqrt(v * Num(correct2)) + Num(double{p.eps});
    result.m.push_back(m);
    result.v.push_back(v);
    result.master.push_back(w -
                            Num(lr) * (m * Num(correct1)) * Reciprocal(root));
  }
  return result;
}

// As a float32's; of a null tensor 0.
inline uint32_t StoredBits(const Tensor& t, int64_t i) {
  if (t.is_null()) return 0;
  return t.dtype() == DType::kF32 ? std::bit_cast<uint32_t>(t.data<float>()[i])
                                  : uint32_t{t.data<BFloat16>()[i].bits} << 16;
}
inline uint32_t MasterBits(const AdamWTensors& tensors, int64_t i) {
  if (tensors.low.is_null()) return StoredBits(tensors.weight, i);
  return std::bit_cast<uint32_t>(JoinHalves(
      {tensors.weight.data<BFloat16>()[i], tensors.low.data<int16_t>()[i]}));
}

// Of what is stored now, alone.
inline DigestSums StateDigest(const AdamWTensors& tensors) {
  const int64_t n = tensors.weight.num_elements();
  DigestSums digest;
  for (int64_t begin = 0; begin < n; begin += kDigestBlock) {
    uint64_t sums[2] = {0, 0};
    for (int64_t i = begin; i < std::min(n, begin + kDigestBlock); ++i) {
      const uint32_t bits[] = {MasterBits(tensors, i), StoredBits(tensors.m, i),
                               StoredBits(tensors.v, i)};
      for (int lane = 0; lane < 2; ++lane) {
        for (int s = 0; s < 3; ++s) {
          sums[lane] +=
              uint64_t{kDigestKeys.key[s][(i - begin) ^ lane]} * bits[s];
        }
      }
    }
    digest.AddBlock((tensors.first + begin) / kDigestBlock, sums);
  }
  return digest;
}

}  // namespace gradwire::reference
