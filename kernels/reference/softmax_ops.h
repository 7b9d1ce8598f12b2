// SPDX-License-Identifier: Apache-2.0
// Definitions of attention and of the logprob head.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/reference/linear.h"
#include "kernels/reference/number.h"

namespace gradwire::reference {

// log of the sum of exp(x), with the largest x taken out.
template <class Num>
Num LogSumExp(const std::vector<Num>& x) {
  double max = Value(x[0]);
  for (const Num& v : x) max = std::max(max, Value(v));
  Sum<Num> sum;
  for (const Num& v : x) sum.Add(Exp(v - Num(max)));
  return Log(sum.Total()) + Num(max);
}

// One query against the keys it sees: positions of a head within qkv.
struct Query {
  int64_t first;  // first token of the sequence
  int64_t token;  // the query's token
  int64_t head;
  int64_t q, k, v;  // offsets within a row
};
template <class Body>
void ForEachQuery(const Kernels::Attention& args, Body body) {
  const AttentionShape& s = args.shape;
  for (int64_t i = 0; i < args.layout.num_sequences; ++i) {
    const int64_t begin = args.layout.cu_seqlens[i];
    for (int64_t t = begin; t < args.layout.cu_seqlens[i + 1]; ++t) {
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t kv_head = head / (s.heads / s.kv_heads);
        body(Query{begin, t, head, head * s.head_dim,
                   (s.heads + kv_head) * s.head_dim,
                   (s.heads + s.kv_heads + kv_head) * s.head_dim});
      }
    }
  }
}

template <class Num>
Num Dot(const Tensor& a, int64_t at, const Tensor& b, int64_t bt, int64_t n) {
  Sum<Num> sum;
  for (int64_t i = 0; i < n; ++i)
    sum.Add(Num(At(a, at + i)) * Num(At(b, bt + i)));
  return sum.Total();
}

template <class Num>
std::vector<Num> Scores(const Kernels::Attention& args, const Query& query) {
  const AttentionShape& s = args.shape;
  const int64_t width = s.QkvWidth();
  std::vector<Num> scores;
  for (int64_t t = query.first; t <= query.token; ++t) {
    scores.push_back(Num(double{s.scale}) *
                     Dot<Num>(args.qkv, query.token * width + query.q, args.qkv,
                              t * width + query.k, s.head_dim));
  }
  return scores;
}

template <class Num>
struct AttentionResult {
  Result<Num> out, lse;
};
template <class Num>
AttentionResult<Num> AttentionForward(const Kernels::Attention& args) {
  const AttentionShape& s = args.shape;
  const int64_t dim = s.head_dim, width = s.QkvWidth();
  const DType act = args.qkv.dtype();
  AttentionResult<Num> result;
  result.out.resize(static_cast<size_t>(args.qkv.dim(0) * s.heads * dim));
  result.lse.resize(static_cast<size_t>(args.qkv.dim(0) * s.heads));
  ForEachQuery(args, [&](const Query& query) {
    const std::vector<Num> scores = Scores<Num>(args, query);
    const Num lse = LogSumExp(scores);
    const int64_t row = query.token * s.heads + query.head;
    result.lse[static_cast<size_t>(row)] = lse;
    std::vector<Sum<Num>> sums(static_cast<size_t>(dim));
    for (size_t j = 0; j < scores.size(); ++j) {
      const Num p = MayRound(act, Exp(scores[j] - lse));
      const int64_t at =
          (query.first + static_cast<int64_t>(j)) * width + query.v;
      for (int64_t i = 0; i < dim; ++i) {
        sums[static_cast<size_t>(i)].Add(p * Num(At(args.qkv, at + i)));
      }
    }
    for (int64_t i = 0; i < dim; ++i) {
      result.out[static_cast<size_t>(row * dim + i)] =
          sums[static_cast<size_t>(i)].Total();
    }
  });
  return result;
}

// d_qkv, from the out and lse that are given.
template <class Num>
Result<Num> AttentionBackward(const Kernels::Attention& args,
                              const Kernels::AttentionGrad& grad) {
  const AttentionShape& s = args.shape;
  const int64_t dim = s.head_dim, width = s.QkvWidth();
  const DType act = args.qkv.dtype();
  std::vector<Sum<Num>> sums(static_cast<size_t>(args.qkv.num_elements()));
  ForEachQuery(args, [&](const Query& query) {
    const std::vector<Num> scores = Scores<Num>(args, query);
    const int64_t row = query.token * s.heads + query.head;
    const Num lse = At(grad.lse, row);
    const Num delta = Dot<Num>(grad.d_out, row * dim, grad.out, row * dim, dim);
    for (size_t j = 0; j < scores.size(); ++j) {
      const int64_t key = (query.first + static_cast<int64_t>(j)) * width;
      const Num p = Exp(scores[j] - lse);
      const Num d_p =
          Dot<Num>(grad.d_out, row * dim, args.qkv, key + query.v, dim);
      const Num kept_p = MayRound(act, p);
      const Num d_s = MayRound(act, Num(double{s.scale}) * p * (d_p - delta));
      for (int64_t i = 0; i < dim; ++i) {
        const int64_t q = query.token * width + query.q + i;
        const int64_t k = key + query.k + i;
        sums[static_cast<size_t>(q)].Add(d_s * Num(At(args.qkv, k)));
        sums[static_cast<size_t>(k)].Add(d_s * Num(At(args.qkv, q)));
        sums[static_cast<size_t>(key + query.v + i)].Add(
            kept_p * Num(At(grad.d_out, row * dim + i)));
      }
    }
  });
  Result<Num> result;
  for (const Sum<Num>& sum : sums) result.push_back(sum.Total());
  return result;
}

template <class Num>
std::vector<Num> Logits(const LogprobHead& head, int64_t token) {
  const int64_t hidden = head.hidden.dim(1);
  std::vector<Num> logits;
  for (int64_t id = 0; id < head.weight.dim(0); ++id) {
    logits.push_back(Dot<Num>(head.hidden, token * hidden, head.weight,
                              id * hidden, hidden));
  }
  return logits;
}

template <class Num>
struct HeadResult {
  Result<Num> logprobs, lse, top_k_logprobs;
  std::vector<int32_t> top_k_indices;
};
template <class Num>
HeadResult<Num> LogprobHeadForward(const LogprobHead& head, int64_t top_k) {
  const int64_t k = head.targets.dim(1);
  HeadResult<Num> result;
  for (int64_t t = 0; t < head.hidden.dim(0); ++t) {
    const std::vector<Num> logits = Logits<Num>(head, t);
    const Num lse = LogSumExp(logits);
    result.lse.push_back(lse);
    for (int64_t j = 0; j < k; ++j) {
      const int32_t target = head.targets.data<int32_t>()[t * k + j];
      result.logprobs.push_back(logits[static_cast<size_t>(target)] - lse);
    }
    std::vector<int32_t> ids(logits.size());
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
      return Value(logits[static_cast<size_t>(a)]) >
             Value(logits[static_cast<size_t>(b)]);
    });
    for (int64_t j = 0; j < top_k; ++j) {
      const int32_t id = ids[static_cast<size_t>(j)];
      result.top_k_indices.push_back(id);
      result.top_k_logprobs.push_back(logits[static_cast<size_t>(id)] - lse);
    }
  }
  return result;
}

template <class Num>
struct HeadGradResult {
  Result<Num> d_hidden, d_weight;
};
// d_weight as it becomes; empty if it is null.
template <class Num>
HeadGradResult<Num> LogprobHeadBackward(const LogprobHead& head,
                                        const Kernels::LogprobHeadGrad& grad,
                                        const Kernels::WeightGrad& weight) {
  const Tensor& d_weight = weight.d_w;
  const int64_t k = head.targets.dim(1), hidden = head.hidden.dim(1);
  const int64_t vocab = head.weight.dim(0);
  const DType act = head.hidden.dtype();
  HeadGradResult<Num> result;
  std::vector<Sum<Num>> sums(static_cast<size_t>(d_weight.num_elements()));
  for (size_t i = 0; weight.accumulate && i < sums.size(); ++i) {
    sums[i].Add(At(d_weight, static_cast<int64_t>(i)));
  }
  for (int64_t t = 0; t < head.hidden.dim(0); ++t) {
    const std::vector<Num> logits = Logits<Num>(head, t);
    const Num lse = At(grad.lse, t);
    Sum<Num> total;
    for (int64_t j = 0; j < k; ++j) total.Add(At(grad.d_logprobs, t * k + j));
    std::vector<Sum<Num>> d_x(static_cast<size_t>(hidden));
    for (int64_t id = 0; id < vocab; ++id) {
      Sum<Num> d_logit;
      bool is_target = false;
      for (int64_t j = 0; j < k; ++j) {
        if (head.targets.data<int32_t>()[t * k + j] == id) {
          d_logit.Add(At(grad.d_logprobs, t * k + j));
          is_target = true;
        }
      }
      const Num p = Exp(logits[static_cast<size_t>(id)] - lse);
      d_logit.Add(-total.Total() * (is_target ? p : MayRound(act, p)));
      const Num d = MayRound(act, d_logit.Total());
      for (int64_t i = 0; i < hidden; ++i) {
        d_x[static_cast<size_t>(i)].Add(d *
                                        Num(At(head.weight, id * hidden + i)));
        if (!d_weight.is_null()) {
          sums[static_cast<size_t>(id * hidden + i)].Add(
              d * Num(At(head.hidden, t * hidden + i)));
        }
      }
    }
    for (const Sum<Num>& sum : d_x) result.d_hidden.push_back(sum.Total());
  }
  for (const Sum<Num>& sum : sums) result.d_weight.push_back(sum.Total());
  return result;
}

}  // namespace gradwire::reference
