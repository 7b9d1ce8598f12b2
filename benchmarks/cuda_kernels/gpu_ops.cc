// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/cuda_kernels/gpu_ops.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "benchmarks/kernels/fill.h"
#include "kernels/squares.h"

namespace gradwire {

GpuOps::GpuOps(CudaDevice& device, Kernels& kernels, Stream& stream,
               const GpuShape& shape, DType act)
    : device_(device),
      kernels_(kernels),
      stream_(stream),
      shape_(shape),
      act_(act) {
  for (int64_t at = 0; at <= shape.tokens; at += shape.length) {
    cu_seqlens_.push_back(static_cast<int32_t>(at));
  }
  const int64_t q = shape.heads * shape.head_dim;
  AddMatmuls("qkv", Heads().QkvWidth(), shape.hidden);
  AddMatmuls("attention_out", shape.hidden, q);
  AddMatmuls("gate_up", 2 * shape.ffn, shape.hidden);
  AddMatmuls("down", shape.hidden, shape.ffn);
  AddAttention();
  AddHead();
  AddEmbedding();
  AddNorms();
  AddRope();
  AddBias();
  AddRows();
  AddSwiGlu();
  AddOptimizer();
}

GpuOps::Copies GpuOps::New(DType dtype, int64_t rows, int64_t columns,
                           int copies, float deviation) {
  // A GPU's time is dear: large operands repeat what the host makes once.
  constexpr int64_t kHostElements = int64_t{1} << 22;
  Copies tensors;
  const int64_t n = rows * columns, bytes = n * DTypeBytes(dtype);
  const int64_t part = std::min(n, kHostElements);
  std::vector<char> host(static_cast<size_t>(part * DTypeBytes(dtype)));
  if (dtype == DType::kF32 || dtype == DType::kBF16) {
    FillNormal(Tensor(host.data(), dtype, {part}), deviation);
  }
  for (int i = 0; i < copies; ++i) {
    auto buffer = device_.Allocate(bytes);
    if (!buffer.ok()) {
      stream_.Fail(buffer.status());
      return Copies(static_cast<size_t>(copies));
    }
    buffers_.push_back(*std::move(buffer));
    tensors.emplace_back(buffers_.back()->data(), dtype,
                         std::initializer_list<int64_t>{rows, columns});
    const Tensor flat = tensors.back().Reshape({n});
    for (int64_t at = 0; at < n; at += part) {
      device_.CopyFromHost(stream_, host.data(),
                           flat.Rows(at, std::min(n, at + part)));
    }
  }
  // `host` ends here.
  static_cast<CudaStream&>(stream_).Check(
      cudaStreamSynchronize(static_cast<CudaStream&>(stream_).get()),
      "filling operands");
  return tensors;
}

Tensor GpuOps::Vector(DType dtype, int64_t n) {
  const Tensor t = New(dtype, n, 1, 1)[0];
  return t.is_null() ? t : t.Reshape({n});
}

// Distinct, if 7919 and the limit have no common factor and n <= limit.
Tensor GpuOps::Ids(int64_t n, int64_t limit) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i) {
    ids.push_back(static_cast<int32_t>(i * 7919 % limit));
  }
  const Tensor tensor = Vector(DType::kI32, n);
  if (!stream_.ok()) return tensor;
  device_.CopyFromHost(stream_, ids.data(), tensor);
  static_cast<CudaStream&>(stream_).Check(
      cudaStreamSynchronize(static_cast<CudaStream&>(stream_).get()),
      "filling operands");
  return tensor;
}

void GpuOps::Add(const std::string& name, const Work& work,
                 std::function<void(size_t copy)> run,
                 const std::vector<Tensor>& outputs, int copies) {
  ops_.push_back({name, work,
                  [copies, run = std::move(run)](int call) {
                    run(static_cast<size_t>(call % copies));
                  },
                  outputs});
}

void GpuOps::AddRows() {
  const int64_t tokens = shape_.tokens, hidden = shape_.hidden;
  const Copies x = New(act_, tokens, hidden), y = New(act_, tokens, hidden);
  const Copies wide = New(DType::kF32, tokens, hidden);
  const Tensor ids = Ids(tokens, tokens);
  if (!stream_.ok()) return;
  Add("gather_rows", PassWork(x[0], y[0]),
      [=, this](size_t i) { kernels_.GatherRows(stream_, x[i], ids, y[i]); },
      {y[0]});
  Add("scatter_rows", PassWork(x[0], y[0]),
      [=, this](size_t i) { kernels_.ScatterRows(stream_, x[i], ids, y[i]); },
      {y[0]});
  Add("scatter_add_rows", PassWork(x[0], y[0]),
      [=, this](size_t i) {
        kernels_.ScatterAddRows(stream_, x[i], ids, y[i]);
      },
      {y[0]});
  Add("add", PassWork(x[0], y[0], y[0]),
      [=, this](size_t i) { kernels_.Add(stream_, x[i], y[i]); }, {y[0]});
  Add("cast_from_f32", PassWork(wide[0], y[0]),
      [=, this](size_t i) { kernels_.Cast(stream_, wide[i], y[i]); }, {y[0]});
  Add("cast_to_f32", PassWork(x[0], wide[0]),
      [=, this](size_t i) { kernels_.Cast(stream_, x[i], wide[i]); },
      {wide[0]});
}

void GpuOps::AddSwiGlu() {
  const int64_t tokens = shape_.tokens, ffn = shape_.ffn;
  const Copies x = New(act_, tokens, 2 * ffn, 2),
               d_x = New(act_, tokens, 2 * ffn, 2);
  const Copies y = New(act_, tokens, ffn, 2), d_y = New(act_, tokens, ffn, 2);
  if (!stream_.ok()) return;
  Add(
      "swiglu_forward", PassWork(x[0], y[0]),
      [=, this](size_t i) { kernels_.SwiGluForward(stream_, x[i], y[i]); },
      {y[0]}, 2);
  Add(
      "swiglu_backward", PassWork(x[0], d_y[0], d_x[0], y[0]),
      [=, this](size_t i) {
        kernels_.SwiGluBackward(stream_, x[i], d_y[i], d_x[i], y[i]);
      },
      {d_x[0], y[0]}, 2);
}

// Of the embedding, which no cache holds.
void GpuOps::AddOptimizer() {
  const int64_t n = shape_.vocab * shape_.hidden;
  const auto flat = [&](DType dtype) {
    const Tensor t = New(dtype, shape_.vocab, shape_.hidden, 1)[0];
    return t.is_null() ? t : t.Reshape({n});
  };
  const Tensor grad = flat(DType::kF32), weight = flat(act_);
  const Tensor low = act_ == DType::kBF16 ? flat(DType::kI16) : Tensor();
  const Tensor digest = New(DType::kI64, 2, 1, 1)[0];
  for (const DType moment : {DType::kF32, DType::kBF16}) {
    const Tensor m = flat(moment), v = flat(moment);
    if (!stream_.ok()) return;
    // Zeros: second moments are not negative.
    device_.Zero(stream_, v);
    AdamWTensors t = {weight, low, m, v, grad};
    const std::string suffix = moment == DType::kF32 ? "" : "_bf16_moments";
    for (const Tensor& to : {Tensor(), digest.Reshape({2})}) {
      t.digest = to;
      Add("adamw" + suffix + (to.is_null() ? "" : "_digest"), AdamWWork(t),
          [=, this](size_t) {
            kernels_.AdamW(stream_,
                           {.learning_rate = 1e-5f,
                            .beta1 = 0.9f,
                            .beta2 = 0.95f,
                            .eps = 1e-8f,
                            .step = 10},
                           t);
          },
          {t.weight, t.m, t.v});
    }
    Add("state_digest" + suffix, StateDigestWork(t),
        [=, this](size_t) { kernels_.StateDigest(stream_, t); }, {});
  }
  const Tensor squares =
      New(DType::kF64, shape_.vocab, SquareBlocks(shape_.hidden), 1)[0];
  if (!stream_.ok()) return;
  const Tensor matrix = grad.Reshape({shape_.vocab, shape_.hidden});
  Add("row_squares", PassWork(matrix, squares),
      [=, this](size_t) { kernels_.RowSquares(stream_, matrix, squares); },
      {squares});
  // Ends with a synchronisation, which is in its time.
  Add("sum", PassWork(squares),
      [=, this](size_t) {
        kernels_.Sum(stream_, squares.Reshape({squares.num_elements()}));
      },
      {});
  if (low.is_null()) return;
  Add("split_master", PassWork(grad, weight, low),
      [=, this](size_t) { kernels_.SplitMaster(stream_, grad, weight, low); },
      {weight});
  Add("join_master", PassWork(weight, low, grad),
      [=, this](size_t) { kernels_.JoinMaster(stream_, weight, low, grad); },
      {grad});
}

}  // namespace gradwire
