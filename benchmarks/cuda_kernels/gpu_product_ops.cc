// SPDX-License-Identifier: Apache-2.0
// A layer's products, attention, and the head.
#include <cmath>
#include <vector>

#include "benchmarks/cuda_kernels/gpu_ops.h"
#include "kernels/squares.h"

namespace gradwire {

AttentionShape GpuOps::Heads() const {
  return {shape_.heads, shape_.kv_heads, shape_.head_dim,
          1.0f / std::sqrt(static_cast<float>(shape_.head_dim))};
}

void GpuOps::AddMatmuls(const std::string& name, int64_t outputs,
                        int64_t inputs) {
  const Copies x = New(act_, shape_.tokens, inputs, kCopies, 1.0f);
  const Copies w = New(act_, outputs, inputs);
  const Copies y = New(act_, shape_.tokens, outputs, kCopies, 1.0f);
  const Copies d_w = New(DType::kF32, outputs, inputs);
  const Tensor squares = New(DType::kF64, outputs, SquareBlocks(inputs), 1)[0];
  if (!stream_.ok()) return;
  const auto grad = [=](size_t i) {
    return Kernels::WeightGrad{d_w[i], false, squares};
  };
  Add("matmul_forward_" + name, MatmulWork(x[0], w[0], y[0], false),
      [=, this](size_t i) {
        kernels_.MatmulForward(stream_, x[i], w[i], y[i], false);
      },
      {y[0]});
  Add("matmul_backward_input_" + name, MatmulWork(y[0], w[0], x[0], false),
      [=, this](size_t i) {
        kernels_.MatmulBackwardInput(stream_, y[i], w[i], x[i], false);
      },
      {x[0]});
  Add("matmul_backward_weight_" + name, MatmulWeightWork(y[0], x[0], grad(0)),
      [=, this](size_t i) {
        kernels_.MatmulBackwardWeight(stream_, y[i], x[i], grad(i));
      },
      {d_w[0], squares});
}

void GpuOps::AddAttention() {
  const AttentionShape shape = Heads();
  const int64_t tokens = shape_.tokens;
  const int64_t width = shape.heads * shape.head_dim;
  const Copies qkv = New(act_, tokens, shape.QkvWidth(), kCopies, 1.0f);
  const Copies d_qkv = New(act_, tokens, shape.QkvWidth());
  const Copies out = New(act_, tokens, width);
  const Copies d_out = New(act_, tokens, width, kCopies, 1.0f);
  const Copies lse = New(DType::kF32, tokens, shape.heads);
  const int64_t bytes = kernels_.AttentionWorkspaceBytes(shape, act_, tokens);
  const Tensor workspace =
      bytes > 0 ? Vector(DType::kF32, bytes / 4) : Tensor();
  if (!stream_.ok()) return;
  const auto args = [=, this](size_t i) {
    return Kernels::Attention{
        shape,
        {cu_seqlens_.data(), static_cast<int64_t>(cu_seqlens_.size()) - 1},
        qkv[i],
        workspace};
  };
  Add("attention_forward", AttentionWork(args(0), out[0]),
      [=, this](size_t i) {
        kernels_.AttentionForward(stream_, args(i), out[i], lse[i]);
      },
      {out[0], lse[0]});
  // What the backward reads of the forward, though that is not asked for.
  for (size_t i = 0; i < qkv.size(); ++i) {
    kernels_.AttentionForward(stream_, args(i), out[i], lse[i]);
  }
  Add("attention_backward", AttentionGradWork(args(0), out[0]),
      [=, this](size_t i) {
        kernels_.AttentionBackward(stream_, args(i), {d_out[i], out[i], lse[i]},
                                   d_qkv[i]);
      },
      {d_qkv[0]});
}

void GpuOps::AddHead() {
  const int64_t tokens = shape_.tokens, hidden = shape_.hidden;
  const Copies x = New(act_, tokens, hidden, kCopies, 1.0f);
  const Copies d_x = New(act_, tokens, hidden);
  const Tensor w = New(act_, shape_.vocab, hidden, 1)[0];
  const Tensor d_w = New(DType::kF32, shape_.vocab, hidden, 1)[0];
  const Tensor squares =
      New(DType::kF64, shape_.vocab, SquareBlocks(hidden), 1)[0];
  const Tensor logprobs = New(DType::kF32, tokens, 1, 1)[0];
  const Tensor d_logprobs = New(DType::kF32, tokens, 1, 1, 1.0f)[0];
  const Copies lse = New(DType::kF32, tokens, 1);
  const Tensor ids = Ids(tokens, shape_.vocab);
  const int64_t bytes =
      kernels_.LogprobHeadWorkspaceBytes(act_, tokens, hidden, shape_.vocab);
  const Tensor workspace =
      bytes > 0 ? Vector(DType::kF32, bytes / 4) : Tensor();
  // One for all copies: which row's they are costs nothing.
  const Tensor kept = Vector(
      DType::kF32,
      (kernels_.LogprobHeadKeptBytes(act_, tokens, 1, shape_.vocab) + 3) / 4);
  if (!stream_.ok()) return;
  const Tensor targets = ids.Reshape({tokens, 1});
  const auto head = [=](size_t i) { return LogprobHead{x[i], w, targets}; };
  const auto forward = [=, this](size_t i) {
    kernels_.LogprobHeadForward(
        stream_, head(i),
        {logprobs, lse[i].Reshape({tokens}), Tensor(), Tensor(), kept},
        workspace);
  };
  Add("logprob_head_forward", LogprobHeadWork(head(0)), forward,
      {logprobs, lse[0]});
  for (size_t i = 0; i < x.size(); ++i) forward(i);
  const auto grad = [=](size_t i, const Tensor& of_forward) {
    Kernels::LogprobHeadGrad g;
    g.kept = of_forward;
    g.d_logprobs = d_logprobs;
    g.lse = lse[i].Reshape({tokens});
    g.workspace = workspace;
    return g;
  };
  const Kernels::WeightGrad d_weight = {d_w, false, squares};
  const auto backward = [&](const std::string& name, const Tensor& of_forward) {
    Add(name, LogprobHeadGradWork(head(0), grad(0, of_forward), d_weight),
        [=, this](size_t i) {
          kernels_.LogprobHeadBackward(stream_, head(i), grad(i, of_forward),
                                       d_x[i], d_weight);
        },
        {d_x[0], d_w, squares});
  };
  backward("logprob_head_backward", kept);
  backward("logprob_head_backward_without_kept", Tensor());
}

}  // namespace gradwire
