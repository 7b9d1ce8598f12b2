// SPDX-License-Identifier: Apache-2.0
// Every op that a training step is made of, on one page: formula, shapes,
// aliasing, and whether an output is written (=) or added to (+=).
//
// Three implementations: reference/ defines each op in float64 plain loops,
// cpu/ is fast, cuda/ runs on GPUs. One conformance suite runs all of them
// (kernels/conformance.h).
//
// Legend of shapes
//   tokens    packed positions of one micro-batch; sequences lie one after the
//             other without padding, their limits in cu_seqlens
//   hidden    width of the residual stream
//   heads, kv_heads, head_dim   attention; heads is a multiple of kv_heads
//   ffn       width of the gated MLP
//   vocab     rows of the head
//   act       the activation type: f32 or bf16, one for all activations and
//             compute weights of a job. Sums, norms, softmax and logprobs are
//             float32 whatever act is; parameter gradients are float32.
//
// All tensors are dense row-major views on the stream's device; all offsets in
// elements. Outputs do not overlap inputs unless the op says so. Every op takes
// every size its contract admits, 0 tokens included. A failure sticks to the
// stream. Results are deterministic: same shapes, same inputs, same number of
// threads => same bits. No op allocates device memory; what it needs beyond its
// arguments comes in as `workspace`, of at least the bytes that the matching
// WorkspaceBytes method states.
// Thread rule: one stream at a time for each Kernels object.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "device/device.h"
#include "device/stream.h"
#include "device/tensor.h"

namespace gradwire {

// Limits of the sequences in a micro-batch, kept on the host.
struct SequenceLayout {
  // i32 [num_sequences + 1] on the host: sequence s is the rows
  // [cu_seqlens[s], cu_seqlens[s + 1]); first 0, last `tokens`, ascending.
  const int32_t* cu_seqlens = nullptr;
  int64_t num_sequences = 0;
};

struct AttentionShape {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;  // even, at most 1024
  // Row width of packed [q | k | v]: (heads + 2 * kv_heads) * head_dim.
  int64_t QkvWidth() const { return (heads + 2 * kv_heads) * head_dim; }
  // Positive factor on q . k before the softmax; 1 / sqrt(head_dim) as a rule.
  float scale = 0.0f;
};

// Arguments of QK-norm and rotary embedding.
struct QkNormRope {
  AttentionShape shape;
  // act [head_dim] each, or null: no QK-norm (Llama, Qwen2).
  Tensor q_weight, k_weight;
  float eps = 1e-6f;
  // f32 [max_positions, head_dim / 2]: cos and sin of position * frequency,
  // any attention factor of the rope type multiplied in.
  Tensor cos, sin;
  // i32 [tokens]: each token's position within its sequence.
  Tensor positions;
};

// Arguments of the head: logprobs of chosen targets under softmax(hidden w^T).
struct LogprobHead {
  Tensor hidden;   // act [tokens, hidden], after the final norm
  Tensor weight;   // act [vocab, hidden]
  Tensor targets;  // i32 [tokens, k], 0 <= target < vocab
};

struct LogprobHeadOutput {
  Tensor logprobs;  // f32 [tokens, k], =
  // f32 [tokens], =: log of the sum of exp(logit), kept for the backward.
  Tensor lse;
  // f32 and i32 [tokens, top_k], = , or null: the top_k largest logprobs,
  // descending, ties by lower id. REQUIRES: top_k <= vocab, 4096.
  Tensor top_k_logprobs, top_k_indices;
  // Null, or at least LogprobHeadKeptBytes: what spares the backward the
  // product that makes the logits.
  Tensor kept = {};
};

struct AdamWParams {
  float learning_rate = 0;
  float beta1 = 0;
  float beta2 = 0;
  float eps = 0;
  float weight_decay = 0;
  // Factor on the gradient before anything else: 1 / counter * clip factor.
  float grad_scale = 1;
  // t of this step, from 1.
  int64_t step = 0;
  // Of the random bits that round bf16 moments.
  uint64_t seed = 0;
};

// One flat parameter group: all tensors have the same number of elements n.
struct AdamWTensors {
  // What products compute with, updated: f32 [n], or bf16 [n] with `low`.
  Tensor weight;
  // Null, or i16 [n], updated: the lower half of a split master
  // (kernels/optimizer_state.h), whose upper half is `weight`.
  Tensor low;
  // f32 [n] or bf16 [n], both the same, updated. In bf16 element i is rounded
  // stochastically by RoundingBits(RoundingKeyOf(seed, step), first + i), after
  // the weight's step has used it as float32.
  Tensor m, v;
  Tensor grad;  // f32 [n], read
  // Of element 0, in the model's flat vector; a multiple of 64.
  int64_t first = 0;
  // Null, or i64 [2] +=: the sums of kernels/state_digest.h over what is stored
  // in weight, low, m and v when the op is done.
  Tensor digest = {};
};

class Kernels {
 public:
  virtual ~Kernels() = default;

  // "cpu avx512_bf16", for job info and the numerics fingerprint.
  virtual std::string description() const = 0;

  // Whether the bits of a row of a product with weights depend on that row and
  // the weights alone, not on which other rows are computed with it.
  virtual bool RowsHaveTheirOwnBits(DType act) const = 0;

  // What was decided since the last call that decides the bits of results, and
  // that arguments do not: which of several algorithms makes a product. Empty:
  // nothing. Of a backend that decides nothing, always.
  virtual std::string TakeChoices() { return ""; }
  // Decides as another process of the same description() has, whose
  // TakeChoices() this is; before the first op. Errors: DATA_LOSS: it is
  // damaged; FAILED_PRECONDITION: it is of another version or device. Then
  // nothing has changed.
  virtual absl::Status AdoptChoices(std::string_view) {
    return absl::FailedPreconditionError("nothing is decided by " +
                                         description());
  }

  // ---- Embedding -----------------------------------------------------------

  // out[t] = table[tokens[t]].
  //   tokens i32 [tokens]; table act [vocab, hidden]; out act [tokens, hidden]
  //   =
  virtual void EmbeddingForward(Stream& stream, const Tensor& tokens,
                                const Tensor& table, const Tensor& out) = 0;
  // d_table[tokens[t]] += d_out[t], each row's terms in ascending t.
  //   d_out act [tokens, hidden]; d_table f32 [vocab, hidden] +=;
  //   squares null, or f64 [vocab, SquareBlocks(hidden)]: the sums of squares
  //   of the rows named by `tokens` =, others stay
  virtual void EmbeddingBackward(Stream& stream, const Tensor& tokens,
                                 const Tensor& d_out, const Tensor& d_table,
                                 const Tensor& squares) = 0;

  // ---- RMSNorm -------------------------------------------------------------

  // r = 1 / sqrt(mean(x^2) + eps); y = x * r * weight.
  //   x act [tokens, hidden]; weight act [hidden]; y act [tokens, hidden] =;
  //   rstd f32 [tokens] =
  virtual void RmsNormForward(Stream& stream, const Tensor& x,
                              const Tensor& weight, float eps, const Tensor& y,
                              const Tensor& rstd) = 0;
  // sum = x + delta (rounded to act), then RMSNorm of sum.
  //   x, delta act [tokens, hidden]; sum act [tokens, hidden] =, may be x.
  struct AddRmsNorm {
    Tensor x, delta;
    Tensor weight;
    float eps = 0;
  };
  virtual void AddRmsNormForward(Stream& stream, const AddRmsNorm& args,
                                 const Tensor& sum, const Tensor& y,
                                 const Tensor& rstd) = 0;
  // With g = d_y * weight and n = x * rstd:
  //   d_x += rstd * (g - n * mean(g * n)); d_weight += sum over tokens d_y * n.
  //   d_y, x act [tokens, hidden]; rstd f32 [tokens];
  //   d_x act [tokens, hidden] +=; d_weight f32 [hidden] +=
  struct RmsNormGrad {
    Tensor d_y;
    Tensor x;
    Tensor weight;
    Tensor rstd;
  };
  virtual void RmsNormBackward(Stream& stream, const RmsNormGrad& args,
                               const Tensor& d_x, const Tensor& d_weight) = 0;

  // ---- Matmul --------------------------------------------------------------

  // y = x w^T (+ y).
  //   x act [m, k]; w act [n, k]; y act [m, n], += if accumulate else =
  virtual void MatmulForward(Stream& stream, const Tensor& x, const Tensor& w,
                             const Tensor& y, bool accumulate) = 0;
  // d_x = d_y w (+ d_x).
  //   d_y act [m, n]; w act [n, k]; d_x act [m, k], += if accumulate else =
  virtual void MatmulBackwardInput(Stream& stream, const Tensor& d_y,
                                   const Tensor& w, const Tensor& d_x,
                                   bool accumulate) = 0;
  // Where a weight's gradient goes.
  struct WeightGrad {
    Tensor d_w;  // f32 [n, k], += if accumulate else =
    bool accumulate = true;
    // f64 [n, SquareBlocks(k)] = or null: d_w's sums of squares
    // (kernels/squares.h) as it becomes.
    Tensor squares = {};
  };
  // d_w = d_y^T x (+ d_w).
  //   d_y act [m, n]; x act [m, k]
  virtual void MatmulBackwardWeight(Stream& stream, const Tensor& d_y,
                                    const Tensor& x,
                                    const WeightGrad& grad) = 0;
  // Tells the backend that the weights at this address have changed (a step, a
  // load), so that packed copies it may keep are stale. Null: all weights.
  virtual void InvalidateWeights(const Tensor& w) = 0;

  // ---- Bias ----------------------------------------------------------------

  // y[t] += bias.   y act [tokens, n] +=; bias act [n]
  virtual void BiasForward(Stream& stream, const Tensor& bias,
                           const Tensor& y) = 0;
  // d_bias += sum over tokens of d_y.   d_y act [tokens, n]; d_bias f32 [n] +=
  virtual void BiasBackward(Stream& stream, const Tensor& d_y,
                            const Tensor& d_bias) = 0;

  // ---- QK-norm and RoPE ----------------------------------------------------

  // Per head of q and k: RMSNorm over head_dim if a weight is given, then the
  // rotation of the halves (a, b) = (x[i], x[i + head_dim / 2]):
  //   a' = a cos - b sin,  b' = b cos + a sin.  v is copied.
  //   qkv act [tokens, QkvWidth]; out act [tokens, QkvWidth] =, may be qkv if
  //   there is no QK-norm.
  virtual void QkNormRopeForward(Stream& stream, const QkNormRope& args,
                                 const Tensor& qkv, const Tensor& out) = 0;
  // From d_out, the gradient of the forward's output, to that of its input.
  //   qkv act [tokens, QkvWidth], the forward's input (read only with QK-norm,
  //   else may be null); d_qkv act [tokens, QkvWidth] =, may be d_out;
  //   d_q_weight, d_k_weight f32 [head_dim] += or null
  struct QkNormRopeGrad {
    Tensor d_out;
    Tensor qkv;
    Tensor d_q_weight, d_k_weight;
  };
  virtual void QkNormRopeBackward(Stream& stream, const QkNormRope& args,
                                  const QkNormRopeGrad& grad,
                                  const Tensor& d_qkv) = 0;

  // ---- Attention -----------------------------------------------------------

  // Causal within each sequence, none across; query head h reads key-value head
  // h / (heads / kv_heads).
  //   qkv act [tokens, QkvWidth] = [q | k | v]; out act [tokens,
  //   heads*head_dim]
  //   =; lse f32 [tokens, heads] =: log of the sum of exp(scale q.k)
  // Memory beyond workspace does not grow with the square of a length.
  virtual int64_t AttentionWorkspaceBytes(const AttentionShape& shape,
                                          DType act, int64_t tokens) const = 0;
  struct Attention {
    AttentionShape shape;
    SequenceLayout layout;
    Tensor qkv;
    Tensor workspace;  // f32, 1-D, or null when 0 bytes are needed
  };
  virtual void AttentionForward(Stream& stream, const Attention& args,
                                const Tensor& out, const Tensor& lse) = 0;
  // Recomputes the scores from qkv and lse.
  //   d_out, out act [tokens, heads * head_dim]; lse f32 [tokens, heads];
  //   d_qkv act [tokens, QkvWidth] =
  struct AttentionGrad {
    Tensor d_out;
    Tensor out;
    Tensor lse;
  };
  virtual void AttentionBackward(Stream& stream, const Attention& args,
                                 const AttentionGrad& grad,
                                 const Tensor& d_qkv) = 0;

  // ---- SwiGLU --------------------------------------------------------------

  // y = silu(gate) * up, where x = [gate | up].
  //   x act [tokens, 2 * ffn]; y act [tokens, ffn] =
  virtual void SwiGluForward(Stream& stream, const Tensor& x,
                             const Tensor& y) = 0;
  // With s = sigmoid(gate): d_gate = d_y up s (1 + gate (1 - s)),
  // d_up = d_y gate s; y = silu(gate) * up again, for the down projection's dW.
  //   x act [tokens, 2 * ffn]; d_y act [tokens, ffn];
  //   d_x act [tokens, 2 * ffn] =, may be x; y act [tokens, ffn] = or null
  virtual void SwiGluBackward(Stream& stream, const Tensor& x,
                              const Tensor& d_y, const Tensor& d_x,
                              const Tensor& y) = 0;

  // ---- Logprob head --------------------------------------------------------

  // logprobs[t, j] = logit[t, targets[t, j]] - lse[t], logit = hidden weight^T
  // in float32. Works by chunks of tokens and vocabulary: no [tokens, vocab]
  // buffer.
  virtual int64_t LogprobHeadWorkspaceBytes(DType act, int64_t tokens,
                                            int64_t hidden,
                                            int64_t vocab) const = 0;
  virtual void LogprobHeadForward(Stream& stream, const LogprobHead& args,
                                  const LogprobHeadOutput& out,
                                  const Tensor& workspace) = 0;
  // Bytes that grow with tokens * vocab; 0 if the implementation keeps nothing.
  virtual int64_t LogprobHeadKeptBytes(DType act, int64_t tokens, int64_t k,
                                       int64_t vocab) const = 0;
  // With p = exp(logit - lse) and G[t] = sum over j of d_logprobs[t, j]:
  //   d_logit[t, i] = sum over j with targets[t, j] = i of d_logprobs[t, j]
  //                   - G[t] p[t, i]
  //   d_hidden = d_logit weight;  d_weight = d_logit^T hidden (+ d_weight).
  // p of an id that is no target of its token may be rounded to act first.
  // Same bits with and without `kept`.
  //   d_logprobs f32 [tokens, k]; lse f32 [tokens];
  //   d_hidden act [tokens, hidden] =; d_weight.d_w f32 [vocab, hidden] or null
  struct LogprobHeadGrad {
    Tensor d_logprobs;
    Tensor lse;
    Tensor workspace;
    // Of the forward of the same arguments, or null.
    Tensor kept = {};
    // i32 [tokens]: of which row of that forward, which had `kept_tokens`, each
    // row here is. Null: of the same.
    Tensor kept_rows = {};
    int64_t kept_tokens = 0;
  };
  virtual void LogprobHeadBackward(Stream& stream, const LogprobHead& args,
                                   const LogprobHeadGrad& grad,
                                   const Tensor& d_hidden,
                                   const WeightGrad& d_weight) = 0;
  // Rows of d_weight that can be made alone at a time; 0 if they can't.
  virtual int64_t LogprobHeadWeightRows(DType act) const = 0;
  // Rows [begin, end) of d_weight alone, with the bits that LogprobHeadBackward
  // gives them. REQUIRES: grad.kept is not null; begin is a multiple of
  // LogprobHeadWeightRows, which is not 0, and end, too, or the vocabulary's
  // size.
  virtual void LogprobHeadBackwardWeight(Stream& stream,
                                         const LogprobHead& args,
                                         const LogprobHeadGrad& grad,
                                         int64_t begin, int64_t end,
                                         const WeightGrad& d_weight) = 0;

  // ---- Rows, casts, sums ---------------------------------------------------

  // out[i] = x[rows[i]].
  //   x [tokens, n]; rows i32 [r]; out [r, n] =; x and out of one type
  virtual void GatherRows(Stream& stream, const Tensor& x, const Tensor& rows,
                          const Tensor& out) = 0;
  // out = 0, then out[rows[i]] = x[i]; rows are distinct.
  //   x act [r, n]; rows i32 [r]; out act [tokens, n] =
  virtual void ScatterRows(Stream& stream, const Tensor& x, const Tensor& rows,
                           const Tensor& out) = 0;
  // out[r] = sum over i with rows[i] = r of x[i], in ascending i in float32,
  // rounded once; 0 where there is none.
  //   x act [n, c]; rows i32 [n]; out act [r, c] =
  virtual void ScatterAddRows(Stream& stream, const Tensor& x,
                              const Tensor& rows, const Tensor& out) = 0;
  // to = from, rounded to nearest even. Shapes equal; f32 <-> bf16 or a copy.
  virtual void Cast(Stream& stream, const Tensor& from, const Tensor& to) = 0;
  // y += x.  act, shapes equal.
  virtual void Add(Stream& stream, const Tensor& x, const Tensor& y) = 0;

  // ---- Optimizer -----------------------------------------------------------

  // The halves of a float32 master (kernels/optimizer_state.h), and back.
  //   master f32 [n]; high bf16 [n] =; low i16 [n] = or null
  virtual void SplitMaster(Stream& stream, const Tensor& master,
                           const Tensor& high, const Tensor& low) = 0;
  //   high bf16 [n]; low i16 [n]; master f32 [n] =
  virtual void JoinMaster(Stream& stream, const Tensor& high, const Tensor& low,
                          const Tensor& master) = 0;

  // Sums of squares (kernels/squares.h).
  //   x f32 [n, k]; squares f64 [n, SquareBlocks(k)] =
  virtual void RowSquares(Stream& stream, const Tensor& x,
                          const Tensor& squares) = 0;
  // The sum of x, f64 [n], in an order that does not depend on the number of
  // threads. Synchronises. 0 if the stream has failed.
  virtual double Sum(Stream& stream, const Tensor& x) = 0;
  // One pass of AdamW (decoupled decay; bias-corrected), w the float32 master:
  //   g = grad * grad_scale;  w -= lr * weight_decay * w;
  //   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
  //   w -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
  virtual void AdamW(Stream& stream, const AdamWParams& params,
                     const AdamWTensors& tensors) = 0;
  // tensors.digest += as AdamW does, of what is stored. m and v may both be
  // null: zeros; grad is not used.
  virtual void StateDigest(Stream& stream, const AdamWTensors& tensors) = 0;
};

}  // namespace gradwire
