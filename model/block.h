// SPDX-License-Identifier: Apache-2.0
// One transformer block of the llama family, and what surrounds the blocks, as
// lists of ops. Llama, Qwen2 and Qwen3 differ in which weights are null.
#pragma once

#include "device/tensor.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/param_table.h"

namespace gradwire {

// Views into the flat compute weights (act) or the flat gradient (f32).
struct BlockParams {
  Tensor input_norm, qkv, qkv_bias, q_norm, k_norm, o, post_norm, gate_up, down;
};
BlockParams BlockParamsAt(const ModelConfig& config, const BlockOffsets& at,
                          const Tensor& flat);

// What a block's backward needs of its forward, [tokens, ...]. `input` is the
// residual stream that enters; the rest can be recomputed from it.
struct BlockActivations {
  Tensor input;      // act [tokens, hidden]
  Tensor rstd1;      // f32 [tokens]
  Tensor qkv;        // act [tokens, QkvWidth], before norm and rotation
  Tensor attention;  // act [tokens, AttentionWidth]
  Tensor lse;        // f32 [tokens, heads]
  Tensor mid;        // act [tokens, hidden], residual after attention
  Tensor rstd2;      // f32 [tokens]
  Tensor gate_up;    // act [tokens, 2 * ffn]; the backward overwrites it
};

// Buffers that live only within a block, [tokens, ...].
struct BlockScratch {
  Tensor normed;       // act [tokens, hidden]
  Tensor hidden;       // act [tokens, hidden]
  Tensor rotated;      // act [tokens, QkvWidth]
  Tensor d_rotated;    // act [tokens, QkvWidth]
  Tensor d_attention;  // act [tokens, AttentionWidth]
  Tensor ffn;          // act [tokens, ffn]
  Tensor d_ffn;        // act [tokens, ffn]
  Tensor attention_workspace;
};

// The micro-batch a block works on.
struct BlockContext {
  const ModelConfig* config;
  SequenceLayout layout;
  Tensor positions;  // i32 [tokens]
  Tensor cos, sin;   // f32 [max_positions, head_dim / 2]
};

// acts.input -> output, act [tokens, hidden] =; fills the rest of acts.
void BlockForward(Stream& stream, Kernels& kernels, const BlockContext& context,
                  const BlockParams& weights, const BlockActivations& acts,
                  const BlockScratch& scratch, const Tensor& output);

// d_residual: the gradient of the block's output, becomes that of its input.
// Adds to the parameters' gradients.
struct BlockGrad {
  BlockParams params;
  Tensor d_residual;
};
void BlockBackward(Stream& stream, Kernels& kernels,
                   const BlockContext& context, const BlockParams& weights,
                   const BlockActivations& acts, const BlockScratch& scratch,
                   const BlockGrad& grad);

}  // namespace gradwire
