// SPDX-License-Identifier: Apache-2.0
// Logprobs of targets without a [tokens, vocab] buffer.
//
// cuBLASLt writes a chunk of logits that a GPU's second-level cache holds (16
// MiB; sm_90 has 50, sm_80 has 40), and the next kernel reads it from there. In
// the backward d_logit is collected over several such chunks, so that the
// products with it are large: each of them reads and writes float32 sums, of
// d_hidden [tokens, hidden] once for each collection of ids, and of d_weight
// [vocab, hidden] once for each of tokens.
//
// A forward may keep e = exp(logit - the chunk's maximum) of all ids, in act,
// which spares the backward the product that makes the logits: a quarter of the
// head's time on tensor cores, for 304 KB a token (152k ids in bf16), written
// once and read once.
#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/logprob_head_kernels.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

// With kLogitIds a chunk of logits: one wave of products' tiles on sm_90.
constexpr int64_t kLogitTokens = 2048;
// Of d_logit. Products in float32 take so long that sums cost little beside
// them, so that fewer ids save memory.
constexpr int64_t kGradTokens = 8192;
constexpr int64_t GradIds(DType act) {
  return act == DType::kBF16 ? 8192 : 2048;
}
static_assert(kGradTokens % kLogitTokens == 0);
static_assert(GradIds(DType::kBF16) % kLogitIds == 0);
static_assert(GradIds(DType::kF32) % kLogitIds == 0);

// Rows of logits and d_logit are whole packs of any kernel.
constexpr int64_t kRowPack = 8;
constexpr int64_t kAlign = 256;

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The arrays in a workspace.
class HeadWorkspace {
 public:
  // `memory` may be null, if only bytes are asked for.
  HeadWorkspace(void* memory, DType act, int64_t tokens, int64_t hidden,
                int64_t vocab)
      : memory_(reinterpret_cast<char*>(
            RoundUp(reinterpret_cast<intptr_t>(memory), kAlign))),
        logit_stride_(RoundUp(std::min(vocab, kLogitIds), kRowPack)),
        d_logit_stride_(RoundUp(std::min(vocab, GradIds(act)), kRowPack)),
        d_logit_at_(RoundUp(std::min(tokens, kLogitTokens) * logit_stride_ * 4,
                            kAlign)),
        sums_at_(d_logit_at_ + RoundUp(std::min(tokens, kGradTokens) *
                                           d_logit_stride_ * DTypeBytes(act),
                                       kAlign)),
        // In float32 d_hidden itself is the sum.
        end_(sums_at_ + (act == DType::kF32
                             ? 0
                             : std::min(tokens, kGradTokens) * hidden * 4)) {}

  int64_t bytes() const { return end_ == 0 ? 0 : end_ + kAlign; }

  float* logits() const { return reinterpret_cast<float*>(memory_); }
  int64_t logit_stride() const { return logit_stride_; }
  char* d_logit() const { return memory_ + d_logit_at_; }
  int64_t d_logit_stride() const { return d_logit_stride_; }
  float* sums() const { return reinterpret_cast<float*>(memory_ + sums_at_); }

 private:
  char* const memory_;
  const int64_t logit_stride_, d_logit_stride_;
  const int64_t d_logit_at_, sums_at_, end_;
};

int64_t NumChunks(int64_t vocab) { return (vocab + kLogitIds - 1) / kLogitIds; }

// What a forward keeps for the backward, one array after the other:
// logprobs f32 [tokens, k]; maxima f32 [chunks, tokens]; of each chunk of ids e
// in act [tokens, padded ids].
class KeptLogits {
 public:
  // `memory` may be null: nothing is kept, or only bytes are asked for.
  KeptLogits(void* memory, DType act, int64_t tokens, int64_t k, int64_t vocab)
      : memory_(static_cast<char*>(memory)),
        act_(act),
        tokens_(tokens),
        k_(k),
        vocab_(vocab),
        maxima_at_(RoundUp(tokens * k * 4, kAlign)),
        exps_at_(maxima_at_ + RoundUp(NumChunks(vocab) * tokens * 4, kAlign)) {}

  int64_t bytes() const {
    return tokens_ == 0 ? 0
                        : exps_at_ + RoundUp(vocab_, kRowPack) * tokens_ *
                                         DTypeBytes(act_);
  }
  bool empty() const { return memory_ == nullptr; }

  // From `token` on, of the chunk that begins with `id`.
  template <typename T>
  KeptChunk<T> Chunk(int64_t id, int64_t token) const {
    if (empty()) return {};
    const int64_t width = RoundUp(std::min(kLogitIds, vocab_ - id), kRowPack);
    return {.exps = reinterpret_cast<T*>(memory_ + exps_at_) + id * tokens_ +
                    token * width,
            .row_stride = width,
            .maxima = reinterpret_cast<float*>(memory_ + maxima_at_) +
                      id / kLogitIds * tokens_ + token,
            .logprobs = reinterpret_cast<float*>(memory_) + token * k_};
  }

 private:
  char* const memory_;
  const DType act_;
  const int64_t tokens_, k_, vocab_, maxima_at_, exps_at_;
};

void CheckHead(const LogprobHead& head, const Tensor& workspace,
               int64_t workspace_bytes) {
  GW_CHECK(head.weight.dtype() == head.hidden.dtype());
  GW_CHECK(head.weight.dim(1) == head.hidden.dim(1));
  GW_CHECK(head.targets.dim(0) == head.hidden.dim(0));
  GW_CHECK(workspace.bytes() >= workspace_bytes);
}

void CheckKept(const LogprobHead& head, const Kernels::LogprobHeadGrad& grad) {
  const int64_t tokens =
      grad.kept_rows.is_null() ? head.hidden.dim(0) : grad.kept_tokens;
  GW_CHECK(grad.kept.is_null() ||
           grad.kept.bytes() >= KeptLogits(nullptr, head.hidden.dtype(), tokens,
                                           head.targets.dim(1),
                                           head.weight.dim(0))
                                    .bytes());
}

// The logits of tokens [first, first + rows) and ids [id, id + cols).
LogitChunk MakeLogits(CudaStream& stream, CudaGemm& gemm,
                      const LogprobHead& head, const HeadWorkspace& memory,
                      LogitChunk chunk, int64_t first) {
  const int64_t hidden = head.hidden.dim(1);
  chunk.logits = memory.logits();
  chunk.row_stride = memory.logit_stride();
  chunk.vocab = head.weight.dim(0);
  gemm.Run(stream,
           {.m = chunk.rows,
            .n = chunk.cols,
            .k = hidden,
            .b_transposed = true,
            .a_row = hidden,
            .b_row = hidden,
            .c_row = chunk.row_stride,
            .ab = head.hidden.dtype(),
            .c = DType::kF32},
           head.hidden.Rows(first, first + chunk.rows).raw(),
           head.weight.Rows(chunk.first_id, chunk.first_id + chunk.cols).raw(),
           memory.logits());
  return chunk;
}

// d_logit of tokens [first, first + all.rows) and the ids of `all`, in the
// workspace.
template <typename T>
void MakeLogitGrads(CudaStream& stream, CudaGemm& gemm, const LogprobHead& head,
                    const Kernels::LogprobHeadGrad& grad,
                    const HeadWorkspace& memory, const LogitChunk& all,
                    int64_t first) {
  const int64_t k = head.targets.dim(1), stride = memory.d_logit_stride();
  T* const d_logit = reinterpret_cast<T*>(memory.d_logit());
  const auto rows_from = [&](int64_t t) -> LogitGradRows {
    return {.targets = head.targets.data<int32_t>() + t * k,
            .d_logprobs = grad.d_logprobs.data<float>() + t * k,
            .lse = grad.lse.data<float>() + t,
            .k = k};
  };
  const bool same_rows = grad.kept_rows.is_null();
  const KeptLogits kept(grad.kept.raw(), head.hidden.dtype(),
                        same_rows ? head.hidden.dim(0) : grad.kept_tokens, k,
                        head.weight.dim(0));
  const auto make = [&](int64_t t, int64_t rows, int64_t id) {
    LogitChunk chunk = {.rows = rows,
                        .first_id = all.first_id + id,
                        .cols = std::min(kLogitIds, all.cols - id),
                        .vocab = head.weight.dim(0)};
    T* const to = d_logit + t * stride + id;
    if (kept.empty()) {
      chunk = MakeLogits(stream, gemm, head, memory, chunk, first + t);
      if (!stream.ok()) return;
      stream.Check(
          MakeLogitGrad(chunk, rows_from(first + t), to, stride, stream.get()),
          "the gradient of logits");
      return;
    }
    stream.Check(
        MakeKeptLogitGrad(
            chunk, rows_from(first + t),
            kept.Chunk<T>(chunk.first_id, same_rows ? first + t : 0),
            same_rows ? nullptr : grad.kept_rows.data<int32_t>() + first + t,
            to, stride, stream.get()),
        "the gradient of logits that were kept");
  };
  const int64_t most = kept.empty() ? kLogitTokens : all.rows;
  for (int64_t t = 0; t < all.rows; t += most) {
    for (int64_t id = 0; id < all.cols; id += kLogitIds) {
      if (!stream.ok()) return;
      make(t, std::min(most, all.rows - t), id);
    }
  }
}

void MakeLogitGrads(CudaStream& stream, CudaGemm& gemm, const LogprobHead& head,
                    const Kernels::LogprobHeadGrad& grad,
                    const HeadWorkspace& memory, const LogitChunk& all,
                    int64_t first) {
  if (head.hidden.dtype() == DType::kBF16) {
    MakeLogitGrads<BFloat16>(stream, gemm, head, grad, memory, all, first);
  } else {
    MakeLogitGrads<float>(stream, gemm, head, grad, memory, all, first);
  }
}

// Rows of `all` of d_weight, from d_logit of tokens [first, first + all.rows).
void MakeWeightGrad(CudaStream& stream, CudaGemm& gemm, const LogprobHead& head,
                    const HeadWorkspace& memory, const LogitChunk& all,
                    int64_t first, const Kernels::WeightGrad& d_weight) {
  const int64_t hidden = head.hidden.dim(1), id = all.first_id;
  gemm.Run(stream,
           {.m = all.cols,
            .n = hidden,
            .k = all.rows,
            .a_transposed = true,
            .a_row = memory.d_logit_stride(),
            .b_row = hidden,
            .c_row = hidden,
            .ab = head.hidden.dtype(),
            .accumulate = first > 0 || d_weight.accumulate},
           memory.d_logit(), head.hidden.Rows(first, first + all.rows).raw(),
           d_weight.d_w.Rows(id, id + all.cols).raw());
}

// The gradient of no tokens.
void MakeNoWeightGrad(CudaStream& stream, CudaGemm& gemm, const Tensor& rows,
                      bool accumulate) {
  gemm.Run(stream,
           {.m = rows.dim(0),
            .n = rows.dim(1),
            .c_row = rows.dim(1),
            .accumulate = accumulate},
           nullptr, nullptr, rows.raw());
}

}  // namespace

int64_t CudaKernels::LogprobHeadWorkspaceBytes(DType act, int64_t tokens,
                                               int64_t hidden,
                                               int64_t vocab) const {
  return HeadWorkspace(nullptr, act, tokens, hidden, vocab).bytes();
}

int64_t CudaKernels::LogprobHeadKeptBytes(DType act, int64_t tokens, int64_t k,
                                          int64_t vocab) const {
  return KeptLogits(nullptr, act, tokens, k, vocab).bytes();
}

// As many as a product of the backward takes, for the same bits.
int64_t CudaKernels::LogprobHeadWeightRows(DType act) const {
  return GradIds(act);
}

void CudaKernels::LogprobHeadForward(Stream& stream, const LogprobHead& args,
                                     const LogprobHeadOutput& out,
                                     const Tensor& workspace) {
  const int64_t tokens = args.hidden.dim(0), vocab = args.weight.dim(0);
  if (!stream.ok() || tokens == 0) return;
  const HeadWorkspace memory(workspace.raw(), args.hidden.dtype(), tokens,
                             args.hidden.dim(1), vocab);
  CheckHead(args, workspace, memory.bytes());
  const int64_t k = args.targets.dim(1);
  const int64_t top_k =
      out.top_k_logprobs.is_null() ? 0 : out.top_k_logprobs.dim(1);
  GW_CHECK(top_k <= vocab);
  const DType act = args.hidden.dtype();
  const KeptLogits kept(out.kept.raw(), act, tokens, k, vocab);
  GW_CHECK(kept.empty() || out.kept.bytes() >= kept.bytes());
  CudaStream& cuda = Cuda(stream);
  float* const running = Scratch<float>(2 * kLogitTokens);
  for (int64_t t = 0; t < tokens; t += kLogitTokens) {
    const int64_t rows = std::min(kLogitTokens, tokens - t);
    for (int64_t id = 0; id < vocab; id += kLogitIds) {
      const LogitChunk chunk =
          MakeLogits(cuda, *gemm_, args, memory,
                     {.rows = rows,
                      .first_id = id,
                      .cols = std::min(kLogitIds, vocab - id)},
                     t);
      if (!stream.ok()) return;
      const LogprobRows of_rows = {
          .targets = args.targets.data<int32_t>() + t * k,
          .k = k,
          .top_k = top_k,
          .logprobs = out.logprobs.data<float>() + t * k,
          .lse = out.lse.data<float>() + t,
          .top_logprobs = top_k == 0
                              ? nullptr
                              : out.top_k_logprobs.data<float>() + t * top_k,
          .top_ids = top_k == 0 ? nullptr
                                : out.top_k_indices.data<int32_t>() + t * top_k,
          .max = running,
          .sum = running + kLogitTokens};
      cuda.Check(act == DType::kBF16
                     ? TakeLogits(chunk, of_rows, kept.Chunk<BFloat16>(id, t),
                                  cuda.get())
                     : TakeLogits(chunk, of_rows, kept.Chunk<float>(id, t),
                                  cuda.get()),
                 "logprobs");
    }
  }
}

void CudaKernels::LogprobHeadBackward(Stream& stream, const LogprobHead& args,
                                      const LogprobHeadGrad& grad,
                                      const Tensor& d_hidden,
                                      const WeightGrad& d_weight) {
  if (!stream.ok()) return;
  const DType act = args.hidden.dtype();
  const int64_t tokens = args.hidden.dim(0), hidden = args.hidden.dim(1);
  const int64_t vocab = args.weight.dim(0);
  const HeadWorkspace memory(grad.workspace.raw(), act, tokens, hidden, vocab);
  CheckHead(args, grad.workspace, memory.bytes());
  CheckKept(args, grad);
  CudaStream& cuda = Cuda(stream);
  if (tokens == 0 && !d_weight.d_w.is_null()) {
    MakeNoWeightGrad(cuda, *gemm_, d_weight.d_w, d_weight.accumulate);
  }
  for (int64_t first = 0; first < tokens; first += kGradTokens) {
    const int64_t rows = std::min(kGradTokens, tokens - first);
    const Tensor of_hidden = d_hidden.Rows(first, first + rows);
    const Tensor sums(act == DType::kF32 ? of_hidden.raw() : memory.sums(),
                      DType::kF32, {rows, hidden});
    for (int64_t id = 0; id < vocab; id += GradIds(act)) {
      const int64_t cols = std::min(GradIds(act), vocab - id);
      const LogitChunk all = {.rows = rows, .first_id = id, .cols = cols};
      MakeLogitGrads(cuda, *gemm_, args, grad, memory, all, first);
      gemm_->Run(cuda,
                 {.m = rows,
                  .n = hidden,
                  .k = cols,
                  .a_row = memory.d_logit_stride(),
                  .b_row = hidden,
                  .c_row = hidden,
                  .ab = act,
                  .accumulate = id > 0},
                 memory.d_logit(), args.weight.Rows(id, id + cols).raw(),
                 sums.raw());
      if (d_weight.d_w.is_null()) continue;
      MakeWeightGrad(cuda, *gemm_, args, memory, all, first, d_weight);
    }
    if (act == DType::kBF16) Cast(stream, sums, of_hidden);
  }
  if (!d_weight.d_w.is_null() && !d_weight.squares.is_null()) {
    RowSquares(stream, d_weight.d_w, d_weight.squares);
  }
}

void CudaKernels::LogprobHeadBackwardWeight(Stream& stream,
                                            const LogprobHead& args,
                                            const LogprobHeadGrad& grad,
                                            int64_t begin, int64_t end,
                                            const WeightGrad& d_weight) {
  if (!stream.ok()) return;
  const DType act = args.hidden.dtype();
  const int64_t tokens = args.hidden.dim(0), vocab = args.weight.dim(0);
  GW_CHECK(!grad.kept.is_null());
  GW_CHECK(begin % GradIds(act) == 0 &&
           (end % GradIds(act) == 0 || end == vocab));
  const HeadWorkspace memory(grad.workspace.raw(), act, tokens,
                             args.hidden.dim(1), vocab);
  CheckHead(args, grad.workspace, memory.bytes());
  CheckKept(args, grad);
  CudaStream& cuda = Cuda(stream);
  if (tokens == 0) {
    MakeNoWeightGrad(cuda, *gemm_, d_weight.d_w.Rows(begin, end),
                     d_weight.accumulate);
  }
  for (int64_t first = 0; first < tokens; first += kGradTokens) {
    const int64_t rows = std::min(kGradTokens, tokens - first);
    for (int64_t id = begin; id < end; id += GradIds(act)) {
      const LogitChunk all = {.rows = rows,
                              .first_id = id,
                              .cols = std::min(GradIds(act), end - id)};
      MakeLogitGrads(cuda, *gemm_, args, grad, memory, all, first);
      MakeWeightGrad(cuda, *gemm_, args, memory, all, first, d_weight);
    }
  }
  if (!d_weight.squares.is_null()) {
    RowSquares(stream, d_weight.d_w.Rows(begin, end),
               d_weight.squares.Rows(begin, end));
  }
}

}  // namespace gradwire
