// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/kernels/step_ops.h"

#include <cmath>
#include <utility>

#include "base/check.h"
#include "benchmarks/kernels/fill.h"
#include "kernels/squares.h"

namespace gradwire {

StepOps::StepOps(CpuDevice& device, Kernels& kernels, const StepShape& shape,
                 DType act)
    : device_(device),
      kernels_(kernels),
      shape_(shape),
      act_(act),
      stream_(device.NewStream()) {
  for (int64_t s = 0; s <= shape.sequences; ++s) {
    cu_seqlens_.push_back(static_cast<int32_t>(s * shape.length));
  }
  const int64_t q = shape.heads * shape.head_dim;
  AddMatmuls("qkv", q + 2 * shape.kv_heads * shape.head_dim, shape.hidden);
  AddMatmuls("attention_out", shape.hidden, q);
  AddMatmuls("gate_up", 2 * shape.ffn, shape.hidden);
  AddMatmuls("down", shape.hidden, shape.ffn);
  AddAttention();
  AddElementwise();
  AddHead();
  AddOptimizer();
}

StepOps::Copies StepOps::New(const std::string&, DType dtype, int64_t rows,
                             int64_t cols, float deviation) {
  Copies copies;
  for (int i = 0; i < kCopies; ++i) {
    auto buffer = device_.Allocate(rows * cols * DTypeBytes(dtype));
    GW_CHECK(buffer.ok());
    buffers_.push_back(*std::move(buffer));
    copies.emplace_back(buffers_.back()->data(), dtype,
                        std::initializer_list<int64_t>{rows, cols});
    if (dtype != DType::kI32 && deviation != 0) {
      FillNormal(copies.back(), deviation);
    }
  }
  return copies;
}

void StepOps::AddMatmuls(const std::string& name, int64_t n, int64_t k) {
  const int64_t m = shape_.tokens();
  const Copies x = New("x", act_, m, k, 1.0f);
  const Copies w = New("w", act_, n, k, 0.02f);
  const Copies y = New("y", act_, m, n, 1.0f);
  const Copies d_w = New("d_w", DType::kF32, n, k, 1.0f);
  const Copies squares = New("squares", DType::kF64, n, SquareBlocks(k), 0.0f);
  const auto grad = [=](size_t i) {
    return Kernels::WeightGrad{d_w[i], false, squares[i]};
  };
  ops_.push_back({"matmul_forward_" + name, shape_.layers,
                  MatmulWork(x[0], w[0], y[0], false), [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.MatmulForward(*stream_, x[i], w[i], y[i], false);
                  }});
  ops_.push_back({"matmul_backward_input_" + name, shape_.layers,
                  MatmulWork(y[0], w[0], x[0], false), [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.MatmulBackwardInput(*stream_, y[i], w[i], x[i],
                                                 false);
                  }});
  ops_.push_back({"matmul_backward_weight_" + name, shape_.layers,
                  MatmulWeightWork(y[0], x[0], grad(0)), [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.MatmulBackwardWeight(*stream_, y[i], x[i],
                                                  grad(i));
                  }});
}

void StepOps::AddAttention() {
  const AttentionShape shape = {
      shape_.heads, shape_.kv_heads, shape_.head_dim,
      1.0f / std::sqrt(static_cast<float>(shape_.head_dim))};
  const int64_t tokens = shape_.tokens();
  const int64_t width = shape.heads * shape.head_dim;
  const Copies qkv = New("qkv", act_, tokens, shape.QkvWidth(), 1.0f);
  const Copies out = New("out", act_, tokens, width, 1.0f);
  const Copies lse = New("lse", DType::kF32, tokens, shape.heads, 0.0f);
  const Copies d_out = New("d_out", act_, tokens, width, 1.0f);
  const Copies d_qkv = New("d_qkv", act_, tokens, shape.QkvWidth(), 0.0f);
  const int64_t workspace_floats =
      kernels_.AttentionWorkspaceBytes(shape, act_, tokens) / 4;
  const Copies workspace =
      New("workspace", DType::kF32, workspace_floats, 1, 0.0f);
  const auto args = [=, this](size_t i) {
    Kernels::Attention a;
    a.shape = shape;
    a.layout = {cu_seqlens_.data(), shape_.sequences};
    a.qkv = qkv[i];
    if (workspace_floats > 0) {
      a.workspace = workspace[i].Reshape({workspace_floats});
    }
    return a;
  };
  ops_.push_back({"attention_forward", shape_.layers,
                  AttentionWork(args(0), out[0]), [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.AttentionForward(*stream_, args(i), out[i],
                                              lse[i]);
                  }});
  // lse of every copy is written before the backward reads it.
  for (size_t i = 0; i < static_cast<size_t>(kCopies); ++i) {
    kernels_.AttentionForward(*stream_, args(i), out[i], lse[i]);
  }
  ops_.push_back({"attention_backward", shape_.layers,
                  AttentionGradWork(args(0), out[0]), [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.AttentionBackward(*stream_, args(i),
                                               {d_out[i], out[i], lse[i]},
                                               d_qkv[i]);
                  }});
}

void StepOps::AddElementwise() {
  const int64_t tokens = shape_.tokens(), hidden = shape_.hidden;
  const int64_t norms = 2 * shape_.layers + 1;

  const Copies x = New("x", act_, tokens, hidden, 1.0f);
  const Copies delta = New("delta", act_, tokens, hidden, 1.0f);
  const Copies y = New("y", act_, tokens, hidden, 0.0f);
  const Copies rstd = New("rstd", DType::kF32, tokens, 1, 1.0f);
  const Copies weight = New("weight", act_, 1, hidden, 1.0f);
  const Copies d_weight = New("d_weight", DType::kF32, 1, hidden, 0.0f);
  const auto vector = [](const Tensor& t) {
    return t.Reshape({t.num_elements()});
  };
  ops_.push_back({"add_rmsnorm_forward", norms,
                  PassWork(x[0], delta[0], x[0], y[0]), [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.AddRmsNormForward(
                        *stream_, {x[i], delta[i], vector(weight[i]), 1e-5f},
                        x[i], y[i], vector(rstd[i]));
                  }});
  ops_.push_back({"rmsnorm_backward", norms,
                  PassWork(delta[0], y[0], x[0], x[0]), [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.RmsNormBackward(
                        *stream_,
                        {delta[i], y[i], vector(weight[i]), vector(rstd[i])},
                        x[i], vector(d_weight[i]));
                  }});

  const Copies gate_up = New("gate_up", act_, tokens, 2 * shape_.ffn, 1.0f);
  const Copies ffn = New("ffn", act_, tokens, shape_.ffn, 1.0f);
  const Copies d_ffn = New("d_ffn", act_, tokens, shape_.ffn, 1.0f);
  const Copies d_gate_up = New("d_gate_up", act_, tokens, 2 * shape_.ffn, 0.0f);
  ops_.push_back({"swiglu_forward", shape_.layers, PassWork(gate_up[0], ffn[0]),
                  [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.SwiGluForward(*stream_, gate_up[i], ffn[i]);
                  }});
  ops_.push_back({"swiglu_backward", shape_.layers,
                  PassWork(gate_up[0], d_ffn[0], d_gate_up[0], ffn[0]),
                  [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.SwiGluBackward(*stream_, gate_up[i], d_ffn[i],
                                            d_gate_up[i], ffn[i]);
                  }});

  const AttentionShape shape = {shape_.heads, shape_.kv_heads, shape_.head_dim,
                                1.0f};
  const Copies qkv = New("qkv", act_, tokens, shape.QkvWidth(), 1.0f);
  const Copies cos =
      New("cos", DType::kF32, shape_.length, shape_.head_dim / 2, 1.0f);
  const Copies positions = New("positions", DType::kI32, tokens, 1, 0.0f);
  for (const Tensor& p : positions) {
    for (int64_t t = 0; t < tokens; ++t) {
      p.data<int32_t>()[t] = static_cast<int32_t>(t % shape_.length);
    }
  }
  const auto rope = [=](size_t i) {
    QkNormRope args;
    args.shape = shape;
    args.cos = cos[i];
    args.sin = cos[(i + 1) % kCopies];
    args.positions = vector(positions[i]);
    return args;
  };
  ops_.push_back({"rope_forward", shape_.layers, PassWork(qkv[0], qkv[0]),
                  [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.QkNormRopeForward(*stream_, rope(i), qkv[i],
                                               qkv[i]);
                  }});
  ops_.push_back({"rope_backward", shape_.layers, PassWork(qkv[0], qkv[0]),
                  [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.QkNormRopeBackward(*stream_, rope(i),
                                                {qkv[i], {}, {}, {}}, qkv[i]);
                  }});
}

void StepOps::AddHead() {
  const int64_t tokens = shape_.tokens(), hidden = shape_.hidden;
  const Copies x = New("x", act_, tokens, hidden, 1.0f);
  const Tensor w = New("w", act_, shape_.vocab, hidden, 0.02f)[0];
  const Tensor d_w = New("d_w", DType::kF32, shape_.vocab, hidden, 0.0f)[0];
  const Tensor squares =
      New("squares", DType::kF64, shape_.vocab, SquareBlocks(hidden), 0.0f)[0];
  const Kernels::WeightGrad d_weight = {d_w, false, squares};
  const Copies d_x = New("d_x", act_, tokens, hidden, 0.0f);
  const Tensor ids = New("ids", DType::kI32, tokens, 1, 0.0f)[0];
  const Tensor logprobs = New("logprobs", DType::kF32, tokens, 1, 0.0f)[0];
  const Tensor d_logprobs = New("d_logprobs", DType::kF32, tokens, 1, 1.0f)[0];
  const Copies lse = New("lse", DType::kF32, tokens, 1, 0.0f);
  const int64_t floats =
      kernels_.LogprobHeadWorkspaceBytes(act_, tokens, hidden, shape_.vocab) /
      4;
  const Tensor workspace = New("workspace", DType::kF32, floats, 1, 0.0f)[0];
  const Tensor kept =
      New("kept", DType::kF32,
          kernels_.LogprobHeadKeptBytes(act_, tokens, 1, shape_.vocab) / 4, 1,
          0.0f)[0];
  for (int64_t t = 0; t < tokens; ++t) {
    ids.data<int32_t>()[t] = static_cast<int32_t>(t * 7919 % shape_.vocab);
  }
  const auto head = [=](size_t i) { return LogprobHead{x[i], w, ids}; };
  const auto out = [=](size_t i) {
    LogprobHeadOutput o;
    o.logprobs = logprobs;
    o.lse = lse[i].Reshape({tokens});
    o.kept = kept.Reshape({kept.num_elements()});
    return o;
  };
  for (size_t i = 0; i < static_cast<size_t>(kCopies); ++i) {
    kernels_.LogprobHeadForward(*stream_, head(i), out(i),
                                workspace.Reshape({floats}));
  }
  ops_.push_back({"logprob_head_forward", 1, LogprobHeadWork(head(0)),
                  [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.LogprobHeadForward(*stream_, head(i), out(i),
                                                workspace.Reshape({floats}));
                  }});
  const auto grad = [=](size_t i) {
    return Kernels::LogprobHeadGrad{d_logprobs, out(i).lse,
                                    workspace.Reshape({floats}), out(i).kept};
  };
  ops_.push_back({"logprob_head_backward", 1,
                  LogprobHeadGradWork(head(0), grad(0), d_weight),
                  [=, this](int call) {
                    const size_t i = static_cast<size_t>(call % kCopies);
                    kernels_.LogprobHeadBackward(*stream_, head(i), grad(i),
                                                 d_x[i], d_weight);
                  }});
  ops_.push_back(
      {"embedding_forward", 1, PassWork(d_x[0], d_x[0]), [=, this](int call) {
         const size_t i = static_cast<size_t>(call % kCopies);
         kernels_.EmbeddingForward(*stream_, ids.Reshape({tokens}), w, d_x[i]);
       }});
  ops_.push_back(
      {"embedding_backward", 1, EmbeddingGradWork(d_x[0]), [=, this](int call) {
         const size_t i = static_cast<size_t>(call % kCopies);
         kernels_.EmbeddingBackward(*stream_, ids.Reshape({tokens}), d_x[i],
                                    d_w, squares);
       }});
}

void StepOps::AddOptimizer() {
  const int64_t n = shape_.vocab * shape_.hidden;
  const Tensor weight = New("weight", act_, n, 1, 0.02f)[0];
  const Tensor grad = New("grad", DType::kF32, n, 1, 1.0f)[0].Reshape({n});
  Tensor low;
  if (act_ == DType::kBF16) {
    low = New("low", DType::kI16, n, 1, 0.0f)[0].Reshape({n});
  }
  const Tensor digest = New("digest", DType::kI64, 2, 1, 0.0f)[0].Reshape({2});
  for (const DType moment : {DType::kF32, DType::kBF16}) {
    const Tensor m = New("m", moment, n, 1, 0.0f)[0];
    const Tensor v = New("v", moment, n, 1, 0.0f)[0];
    AdamWTensors tensors = {weight.Reshape({n}), low, m.Reshape({n}),
                            v.Reshape({n}), grad};
    const std::string name =
        moment == DType::kF32 ? "adamw" : "adamw_bf16_moments";
    for (const Tensor& to : {Tensor(), digest}) {
      tensors.digest = to;
      ops_.push_back({name + (to.is_null() ? "" : "_digest"), 0,
                      AdamWWork(tensors), [=, this](int call) {
                        kernels_.AdamW(*stream_,
                                       {.learning_rate = 1e-5f,
                                        .beta1 = 0.9f,
                                        .beta2 = 0.95f,
                                        .eps = 1e-8f,
                                        .step = call + 1},
                                       tensors);
                      }});
    }
  }
  const Tensor squares = New("squares", DType::kF64, shape_.vocab,
                             SquareBlocks(shape_.hidden), 0.0f)[0];
  const Tensor matrix = grad.Reshape({shape_.vocab, shape_.hidden});
  ops_.push_back({"row_squares", 0, PassWork(matrix, squares), [=, this](int) {
                    kernels_.RowSquares(*stream_, matrix, squares);
                  }});
}

}  // namespace gradwire
