// SPDX-License-Identifier: Apache-2.0
// Passes over memory around a layer's products.
#include <vector>

#include "benchmarks/cuda_kernels/gpu_ops.h"
#include "kernels/squares.h"

namespace gradwire {

void GpuOps::AddEmbedding() {
  const int64_t tokens = shape_.tokens, hidden = shape_.hidden;
  const Tensor ids = Ids(tokens, shape_.vocab);
  const Tensor table = New(act_, shape_.vocab, hidden, 1)[0];
  const Tensor d_table = New(DType::kF32, shape_.vocab, hidden, 1)[0];
  const Tensor squares =
      New(DType::kF64, shape_.vocab, SquareBlocks(hidden), 1)[0];
  const Copies x = New(act_, tokens, hidden);
  if (!stream_.ok()) return;
  Add("embedding_forward", PassWork(x[0], x[0]),
      [=, this](size_t i) {
        kernels_.EmbeddingForward(stream_, ids, table, x[i]);
      },
      {x[0]});
  Add("embedding_backward", EmbeddingGradWork(x[0]),
      [=, this](size_t i) {
        kernels_.EmbeddingBackward(stream_, ids, x[i], d_table, squares);
      },
      {d_table});
}

void GpuOps::AddNorms() {
  const int64_t tokens = shape_.tokens, hidden = shape_.hidden;
  const Copies x = New(act_, tokens, hidden), y = New(act_, tokens, hidden);
  const Copies delta = New(act_, tokens, hidden);
  const Copies d_x = New(act_, tokens, hidden);
  const Tensor weight = Vector(act_, hidden);
  const Tensor d_weight = Vector(DType::kF32, hidden);
  const Tensor rstd = Vector(DType::kF32, tokens);
  if (!stream_.ok()) return;
  Add("rmsnorm_forward", PassWork(x[0], y[0]),
      [=, this](size_t i) {
        kernels_.RmsNormForward(stream_, x[i], weight, 1e-6f, y[i], rstd);
      },
      {y[0], rstd});
  Add("add_rmsnorm_forward", PassWork(x[0], delta[0], x[0], y[0]),
      [=, this](size_t i) {
        kernels_.AddRmsNormForward(stream_, {x[i], delta[i], weight, 1e-6f},
                                   x[i], y[i], rstd);
      },
      {x[0], y[0], rstd});
  Add("rmsnorm_backward", PassWork(delta[0], x[0], d_x[0], d_x[0]),
      [=, this](size_t i) {
        kernels_.RmsNormBackward(stream_, {delta[i], x[i], weight, rstd},
                                 d_x[i], d_weight);
      },
      {d_x[0], d_weight});
}

void GpuOps::AddRope() {
  const int64_t tokens = shape_.tokens, half = shape_.head_dim / 2;
  const Copies qkv = New(act_, tokens, Heads().QkvWidth(), kCopies, 1.0f);
  const Copies out = New(act_, tokens, Heads().QkvWidth());
  const Copies d_out = New(act_, tokens, Heads().QkvWidth(), kCopies, 1.0f);
  const Copies d_qkv = New(act_, tokens, Heads().QkvWidth());
  const Tensor d_q = Vector(DType::kF32, shape_.head_dim);
  const Tensor d_k = Vector(DType::kF32, shape_.head_dim);
  QkNormRope args;
  args.shape = Heads();
  args.q_weight = Vector(act_, shape_.head_dim);
  args.k_weight = Vector(act_, shape_.head_dim);
  args.cos = New(DType::kF32, shape_.length, half, 1, 0.5f)[0];
  args.sin = New(DType::kF32, shape_.length, half, 1, 0.5f)[0];
  args.positions = Ids(tokens, shape_.length);
  if (!stream_.ok()) return;
  Add("qk_norm_rope_forward", PassWork(qkv[0], out[0]),
      [=, this](size_t i) {
        kernels_.QkNormRopeForward(stream_, args, qkv[i], out[i]);
      },
      {out[0]});
  Add("qk_norm_rope_backward", PassWork(qkv[0], d_out[0], d_qkv[0]),
      [=, this](size_t i) {
        kernels_.QkNormRopeBackward(stream_, args, {d_out[i], qkv[i], d_q, d_k},
                                    d_qkv[i]);
      },
      {d_qkv[0], d_q, d_k});
}

// Qwen2 has them on [q | k | v].
void GpuOps::AddBias() {
  const int64_t width = Heads().QkvWidth();
  const Copies y = New(act_, shape_.tokens, width);
  const Tensor bias = Vector(act_, width);
  const Tensor d_bias = Vector(DType::kF32, width);
  if (!stream_.ok()) return;
  Add("bias_forward", PassWork(y[0], y[0]),
      [=, this](size_t i) { kernels_.BiasForward(stream_, bias, y[i]); },
      {y[0]});
  Add("bias_backward", PassWork(y[0]),
      [=, this](size_t i) { kernels_.BiasBackward(stream_, y[i], d_bias); },
      {d_bias});
}

}  // namespace gradwire
