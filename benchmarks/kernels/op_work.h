// SPDX-License-Identifier: Apache-2.0
// The work that a call of an op must do, from its arguments.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace gradwire {

struct Work {
  double flops = 0;  // of products: multiply and add count as two
  double bytes = 0;  // every operand read once, every result written once
};

// y = x w^T; or of d_x = d_y w, with d_y, w and d_x.
Work MatmulWork(const Tensor& x, const Tensor& w, const Tensor& y,
                bool accumulate);
// d_w = d_y^T x (+ d_w).
Work MatmulWeightWork(const Tensor& d_y, const Tensor& x,
                      const Kernels::WeightGrad& grad);

// Causal: half of every sequence's square. The backward makes the scores again:
// five products where the forward has two.
Work AttentionWork(const Kernels::Attention& args, const Tensor& out);
Work AttentionGradWork(const Kernels::Attention& args, const Tensor& out);

Work LogprobHeadWork(const LogprobHead& args);
// Two products, and a third for the logits if none were kept.
Work LogprobHeadGradWork(const LogprobHead& args,
                         const Kernels::LogprobHeadGrad& grad,
                         const Kernels::WeightGrad& d_weight);

Work EmbeddingGradWork(const Tensor& d_out);
Work AdamWWork(const AdamWTensors& tensors);
Work StateDigestWork(const AdamWTensors& tensors);

// A pass over memory without products: each tensor that is read and each that
// is written, hence one that is updated twice. Null tensors count nothing.
template <typename... Tensors>
Work PassWork(const Tensors&... tensors) {
  return {0, static_cast<double>((tensors.bytes() + ...))};
}

}  // namespace gradwire
