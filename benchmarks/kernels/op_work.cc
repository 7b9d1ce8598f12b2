// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/kernels/op_work.h"

namespace gradwire {
namespace {

double Bytes(const Tensor& tensor) {
  return static_cast<double>(tensor.bytes());
}

double GradientBytes(const Kernels::WeightGrad& grad) {
  return Bytes(grad.d_w) * (grad.accumulate ? 2 : 1) + Bytes(grad.squares);
}

// Positions that attend to each other, halved for causality.
double Pairs(const SequenceLayout& layout) {
  double pairs = 0;
  for (int64_t s = 0; s < layout.num_sequences; ++s) {
    const double n = layout.cu_seqlens[s + 1] - layout.cu_seqlens[s];
    pairs += n * n / 2;
  }
  return pairs;
}

double HeadProductFlops(const LogprobHead& args) {
  return 2.0 * static_cast<double>(args.hidden.num_elements()) *
         static_cast<double>(args.weight.dim(0));
}

}  // namespace

Work MatmulWork(const Tensor& x, const Tensor& w, const Tensor& y,
                bool accumulate) {
  return {2.0 * static_cast<double>(x.dim(0)) *
              static_cast<double>(w.num_elements()),
          Bytes(x) + Bytes(w) + Bytes(y) * (accumulate ? 2 : 1)};
}

Work MatmulWeightWork(const Tensor& d_y, const Tensor& x,
                      const Kernels::WeightGrad& grad) {
  return {2.0 * static_cast<double>(d_y.dim(0)) *
              static_cast<double>(grad.d_w.num_elements()),
          Bytes(d_y) + Bytes(x) + GradientBytes(grad)};
}

Work AttentionWork(const Kernels::Attention& args, const Tensor& out) {
  const double width = static_cast<double>(out.dim(1));
  return {4.0 * width * Pairs(args.layout), Bytes(args.qkv) + Bytes(out)};
}

Work AttentionGradWork(const Kernels::Attention& args, const Tensor& out) {
  const Work forward = AttentionWork(args, out);
  return {2.5 * forward.flops, 2 * forward.bytes};
}

Work LogprobHeadWork(const LogprobHead& args) {
  return {HeadProductFlops(args), Bytes(args.hidden) + Bytes(args.weight)};
}

Work LogprobHeadGradWork(const LogprobHead& args,
                         const Kernels::LogprobHeadGrad& grad,
                         const Kernels::WeightGrad& d_weight) {
  const double products = grad.kept.is_null() ? 3 : 2;
  return {
      products * HeadProductFlops(args),
      2 * Bytes(args.hidden) + Bytes(args.weight) + GradientBytes(d_weight)};
}

Work EmbeddingGradWork(const Tensor& d_out) {
  // Rows of float32, read and written.
  return {0, Bytes(d_out) + 8.0 * static_cast<double>(d_out.num_elements())};
}

Work AdamWWork(const AdamWTensors& tensors) {
  return {0, 2 * (Bytes(tensors.weight) + Bytes(tensors.low) +
                  Bytes(tensors.m) + Bytes(tensors.v)) +
                 Bytes(tensors.grad)};
}
Work StateDigestWork(const AdamWTensors& tensors) {
  return {0, Bytes(tensors.weight) + Bytes(tensors.low) + Bytes(tensors.m) +
                 Bytes(tensors.v)};
}

}  // namespace gradwire
