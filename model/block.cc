// SPDX-License-Identifier: Apache-2.0
#include "model/block.h"

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "kernels/squares.h"

namespace gradwire {
namespace {

Tensor View(const Tensor& flat, int64_t offset,
            std::initializer_list<int64_t> shape) {
  int64_t n = 1;
  for (int64_t dim : shape) n *= dim;
  return flat.Rows(offset, offset + n).Reshape(shape);
}

AttentionShape ShapeOf(const ModelConfig& config) {
  AttentionShape shape;
  shape.heads = config.heads;
  shape.kv_heads = config.kv_heads;
  shape.head_dim = config.head_dim;
  shape.scale =
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_dim)));
  return shape;
}

QkNormRope RopeArgs(const BlockContext& context, const BlockParams& weights) {
  QkNormRope args;
  args.shape = ShapeOf(*context.config);
  args.q_weight = weights.q_norm;
  args.k_weight = weights.k_norm;
  args.eps = static_cast<float>(context.config->rms_eps);
  args.cos = context.cos;
  args.sin = context.sin;
  args.positions = context.positions;
  return args;
}

Kernels::Attention AttentionArgs(const BlockContext& context,
                                 const BlockScratch& scratch) {
  Kernels::Attention args;
  args.shape = ShapeOf(*context.config);
  args.layout = context.layout;
  args.qkv = context.row_of.is_null() ? scratch.rotated : scratch.token_rotated;
  args.workspace = scratch.attention_workspace;
  return args;
}

// scratch.rotated -> acts.attention, acts.lse.
void AttentionOfRows(Stream& stream, Kernels& kernels,
                     const BlockContext& context, const BlockActivations& acts,
                     const BlockScratch& scratch) {
  const Kernels::Attention args = AttentionArgs(context, scratch);
  if (context.row_of.is_null()) {
    kernels.AttentionForward(stream, args, acts.attention, acts.lse);
    return;
  }
  kernels.GatherRows(stream, scratch.rotated, context.row_of,
                     scratch.token_rotated);
  kernels.AttentionForward(stream, args, scratch.token_attention, acts.lse);
  kernels.GatherRows(stream, scratch.token_attention, context.token_of,
                     acts.attention);
}

// scratch.rotated, scratch.d_attention -> scratch.d_rotated. A row's gradient
// enters at one of its tokens; keys and values get theirs from all of them.
void AttentionOfRowsBackward(Stream& stream, Kernels& kernels,
                             const BlockContext& context,
                             const BlockActivations& acts,
                             const BlockScratch& scratch) {
  const Kernels::Attention args = AttentionArgs(context, scratch);
  if (context.row_of.is_null()) {
    kernels.AttentionBackward(stream, args,
                              {scratch.d_attention, acts.attention, acts.lse},
                              scratch.d_rotated);
    return;
  }
  kernels.GatherRows(stream, scratch.rotated, context.row_of,
                     scratch.token_rotated);
  kernels.GatherRows(stream, acts.attention, context.row_of,
                     scratch.token_attention);
  kernels.ScatterRows(stream, scratch.d_attention, context.token_of,
                      scratch.token_d_attention);
  kernels.AttentionBackward(
      stream, args,
      {scratch.token_d_attention, scratch.token_attention, acts.lse},
      scratch.token_d_rotated);
  kernels.ScatterAddRows(stream, scratch.token_d_rotated, context.row_of,
                         scratch.d_rotated);
}

}  // namespace

BlockParams BlockParamsAt(const ModelConfig& config, const BlockOffsets& at,
                          const Tensor& values, int64_t begin) {
  const int64_t hidden = config.hidden;
  const auto view = [&](int64_t offset, std::initializer_list<int64_t> shape) {
    return offset < 0 ? Tensor() : View(values, offset - begin, shape);
  };
  BlockParams params;
  params.input_norm = view(at.input_norm, {hidden});
  params.qkv = view(at.qkv, {config.QkvWidth(), hidden});
  params.qkv_bias = view(at.qkv_bias, {config.QkvWidth()});
  params.q_norm = view(at.q_norm, {config.head_dim});
  params.k_norm = view(at.k_norm, {config.head_dim});
  params.o = view(at.o, {hidden, config.AttentionWidth()});
  params.post_norm = view(at.post_norm, {hidden});
  params.gate_up = view(at.gate_up, {2 * config.ffn, hidden});
  params.down = view(at.down, {hidden, config.ffn});
  return params;
}

BlockSquares BlockSquaresAt(const ModelConfig& config, const ParamTable& table,
                            const BlockOffsets& at, const Tensor& flat) {
  const auto view = [&](int64_t offset, int64_t rows, int64_t cols) {
    return View(flat, table.SquaresOffset(offset), {rows, SquareBlocks(cols)});
  };
  BlockSquares squares;
  if (flat.is_null()) return squares;
  squares.qkv = view(at.qkv, config.QkvWidth(), config.hidden);
  squares.o = view(at.o, config.hidden, config.AttentionWidth());
  squares.gate_up = view(at.gate_up, 2 * config.ffn, config.hidden);
  squares.down = view(at.down, config.hidden, config.ffn);
  return squares;
}

void BlockForward(Stream& stream, Kernels& kernels, const BlockContext& context,
                  const BlockParams& weights, const BlockActivations& acts,
                  const BlockScratch& scratch, const Tensor& output) {
  const float eps = static_cast<float>(context.config->rms_eps);
  kernels.RmsNormForward(stream, acts.input, weights.input_norm, eps,
                         scratch.normed, acts.rstd1);
  kernels.MatmulForward(stream, scratch.normed, weights.qkv, acts.qkv, false);
  if (!weights.qkv_bias.is_null()) {
    kernels.BiasForward(stream, weights.qkv_bias, acts.qkv);
  }
  kernels.QkNormRopeForward(stream, RopeArgs(context, weights), acts.qkv,
                            scratch.rotated);
  AttentionOfRows(stream, kernels, context, acts, scratch);
  kernels.MatmulForward(stream, acts.attention, weights.o, scratch.hidden,
                        false);
  kernels.AddRmsNormForward(
      stream, {acts.input, scratch.hidden, weights.post_norm, eps}, acts.mid,
      scratch.normed, acts.rstd2);
  kernels.MatmulForward(stream, scratch.normed, weights.gate_up, acts.gate_up,
                        false);
  kernels.SwiGluForward(stream, acts.gate_up, scratch.ffn);
  kernels.Cast(stream, acts.mid, output);
  kernels.MatmulForward(stream, scratch.ffn, weights.down, output, true);
}

void BlockBackward(Stream& stream, Kernels& kernels,
                   const BlockContext& context, const BlockParams& weights,
                   const BlockActivations& acts, const BlockScratch& scratch,
                   const BlockGrad& grad) {
  const float eps = static_cast<float>(context.config->rms_eps);
  const Tensor& d = grad.d_residual;

  // MLP. The norm and SwiGLU are recomputed rather than kept.
  kernels.MatmulBackwardInput(stream, d, weights.down, scratch.d_ffn, false);
  kernels.SwiGluBackward(stream, acts.gate_up, scratch.d_ffn, acts.gate_up,
                         scratch.ffn);
  kernels.MatmulBackwardWeight(
      stream, d, scratch.ffn,
      {grad.params.down, grad.accumulate, grad.squares.down});
  kernels.RmsNormForward(stream, acts.mid, weights.post_norm, eps,
                         scratch.normed, acts.rstd2);
  kernels.MatmulBackwardWeight(
      stream, acts.gate_up, scratch.normed,
      {grad.params.gate_up, grad.accumulate, grad.squares.gate_up});
  kernels.MatmulBackwardInput(stream, acts.gate_up, weights.gate_up,
                              scratch.hidden, false);
  kernels.RmsNormBackward(
      stream, {scratch.hidden, acts.mid, weights.post_norm, acts.rstd2}, d,
      grad.params.post_norm);

  // Attention.
  kernels.MatmulBackwardInput(stream, d, weights.o, scratch.d_attention, false);
  kernels.MatmulBackwardWeight(
      stream, d, acts.attention,
      {grad.params.o, grad.accumulate, grad.squares.o});
  kernels.QkNormRopeForward(stream, RopeArgs(context, weights), acts.qkv,
                            scratch.rotated);
  AttentionOfRowsBackward(stream, kernels, context, acts, scratch);
  kernels.QkNormRopeBackward(
      stream, RopeArgs(context, weights),
      {scratch.d_rotated, acts.qkv, grad.params.q_norm, grad.params.k_norm},
      scratch.d_rotated);
  if (!weights.qkv_bias.is_null()) {
    kernels.BiasBackward(stream, scratch.d_rotated, grad.params.qkv_bias);
  }
  kernels.RmsNormForward(stream, acts.input, weights.input_norm, eps,
                         scratch.normed, acts.rstd1);
  kernels.MatmulBackwardWeight(
      stream, scratch.d_rotated, scratch.normed,
      {grad.params.qkv, grad.accumulate, grad.squares.qkv});
  kernels.MatmulBackwardInput(stream, scratch.d_rotated, weights.qkv,
                              scratch.hidden, false);
  kernels.RmsNormBackward(
      stream, {scratch.hidden, acts.input, weights.input_norm, acts.rstd1}, d,
      grad.params.input_norm);
}

}  // namespace gradwire
