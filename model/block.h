// SPDX-License-Identifier: Apache-2.0
// One transformer block of the llama family, and what surrounds the blocks, as
// lists of ops. Llama, Qwen2 and Qwen3 differ in which weights are null.
#pragma once

#include "device/tensor.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/param_table.h"

namespace gradwire {

// Views into compute weights (act) or gradients (f32).
struct BlockParams {
  Tensor input_norm, qkv, qkv_bias, q_norm, k_norm, o, post_norm, gate_up, down;
};
// Of `values`, which begin with element `begin` of the flat vector.
BlockParams BlockParamsAt(const ModelConfig& config, const BlockOffsets& at,
                          const Tensor& values, int64_t begin);

// A row is a token, or several: tokens whose sequences have been the same up to
// and with them share one. Only attention knows tokens.

// What a block's backward needs of its forward, [rows, ...]. `input` is the
// residual stream that enters; the rest can be recomputed from it.
struct BlockActivations {
  Tensor input;      // act [rows, hidden]
  Tensor rstd1;      // f32 [rows]
  Tensor qkv;        // act [rows, QkvWidth], before norm and rotation
  Tensor attention;  // act [rows, AttentionWidth]
  Tensor lse;        // f32 [tokens, heads]
  Tensor mid;        // act [rows, hidden], residual after attention
  Tensor rstd2;      // f32 [rows]
  Tensor gate_up;    // act [rows, 2 * ffn]; the backward overwrites it
};

// Buffers that live only within a block, [rows, ...].
struct BlockScratch {
  Tensor normed;       // act [rows, hidden]
  Tensor hidden;       // act [rows, hidden]
  Tensor rotated;      // act [rows, QkvWidth]
  Tensor d_rotated;    // act [rows, QkvWidth]
  Tensor d_attention;  // act [rows, AttentionWidth]
  Tensor ffn;          // act [rows, ffn]
  Tensor d_ffn;        // act [rows, ffn]
  Tensor attention_workspace;
  // The same by tokens; null if no row is shared.
  Tensor token_rotated, token_d_rotated;      // act [tokens, QkvWidth]
  Tensor token_attention, token_d_attention;  // act [tokens, AttentionWidth]
};

// The micro-batch a block works on.
struct BlockContext {
  const ModelConfig* config;
  SequenceLayout layout;  // of tokens
  Tensor positions;       // i32 [rows]
  // i32 [tokens]: each token's row; i32 [rows]: one of a row's tokens. Null if
  // no row is shared.
  Tensor row_of, token_of;
  Tensor cos, sin;  // f32 [max_positions, head_dim / 2]
};

// acts.input -> output, act [rows, hidden] =; fills the rest of acts.
void BlockForward(Stream& stream, Kernels& kernels, const BlockContext& context,
                  const BlockParams& weights, const BlockActivations& acts,
                  const BlockScratch& scratch, const Tensor& output);

// Sums of squares of a block's gradients of matrices, f64.
struct BlockSquares {
  Tensor qkv, o, gate_up, down;
};
// Views into those of all parameters; null if `flat` is.
BlockSquares BlockSquaresAt(const ModelConfig& config, const ParamTable& table,
                            const BlockOffsets& at, const Tensor& flat);

// d_residual: the gradient of the block's output, becomes that of its input.
// Adds to the gradients of vectors; to those of matrices too if `accumulate`,
// else writes them.
struct BlockGrad {
  BlockParams params;
  BlockSquares squares;
  Tensor d_residual;
  bool accumulate = true;
};
void BlockBackward(Stream& stream, Kernels& kernels,
                   const BlockContext& context, const BlockParams& weights,
                   const BlockActivations& acts, const BlockScratch& scratch,
                   const BlockGrad& grad);

}  // namespace gradwire
