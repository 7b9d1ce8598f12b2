// SPDX-License-Identifier: Apache-2.0
// Logprobs of targets without a [tokens, vocab] buffer.
//
// A thread takes a block of tokens through the vocabulary, chunk by chunk; the
// chunk's logits stay in its second-level cache from the product that makes
// them to the last look at them. In the backward a chunk of d_logit for all
// tokens of a batch part is shared, because d_weight sums over tokens: threads
// first split the tokens (logits, d_logit, d_hidden), then the chunk's rows of
// d_weight.
//
// A logit is looked at through e = exp(logit - the chunk's maximum), in act:
// the forward may keep these for the backward, which otherwise makes them again
// with the same bits. p = e exp(maximum - lse), and of a target p =
// exp(logprob), in float32, so that 1 - p keeps its digits where p is near 1.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/logit_rows.h"
#include "kernels/cpu/softmax_tile.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

// A chunk of logits, kBlock x kChunk floats, takes half of a common 1 MiB
// second-level cache.
constexpr int64_t kBlock = 256;
constexpr int64_t kChunk = 512;
// Tokens whose d_logit chunk is kept at once: long enough that reading and
// writing d_weight is small beside the product.
constexpr int64_t kTokens = 2048;

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Tokens a thread takes at a time, at most `most`: all threads get as many
// blocks.
int64_t BlockTokens(int64_t tokens, int threads, int64_t most = kBlock) {
  const int64_t rounds =
      std::max<int64_t>(1, RoundUp(tokens, most * threads) / (most * threads));
  return std::min(
      most, RoundUp(RoundUp(tokens, rounds * threads) / (rounds * threads),
                    kRowPadding));
}

// The logits of some tokens and ids.
GemmShape LogitShape(const LogprobHead& head, int64_t rows, int64_t cols) {
  const int64_t hidden = head.hidden.dim(1);
  return {.m = rows,
          .n = cols,
          .k = hidden,
          .a_row = hidden,
          .b_row = 1,
          .b_col = hidden,
          .c_row = RoundUp(cols, kRowPadding),
          .ab = head.hidden.dtype()};
}

// A row's largest logits so far, descending, and their ids; ids come in
// ascending order, so an equal logit that comes later goes behind.
void InsertTop(float logit, int32_t id, int64_t top_k, float* logits,
               int32_t* ids) {
  if (!(logit > logits[top_k - 1])) return;
  int64_t at = top_k - 1;
  for (; at > 0 && logit > logits[at - 1]; --at) {
    logits[at] = logits[at - 1];
    ids[at] = ids[at - 1];
  }
  logits[at] = logit;
  ids[at] = id;
}

int64_t NumChunks(int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

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
        vocab_(vocab),
        maxima_at_(tokens * k * 4),
        exps_at_(RoundUp(maxima_at_ + NumChunks(vocab) * tokens * 4, 64)) {}

  int64_t bytes() const { return At(vocab_, 0); }
  bool empty() const { return memory_ == nullptr; }

  float* logprobs() const { return reinterpret_cast<float*>(memory_); }
  // The chunk that begins with `id`.
  float* maxima(int64_t id) const {
    return reinterpret_cast<float*>(memory_ + maxima_at_) +
           id / kChunk * tokens_;
  }
  char* exps(int64_t id, int64_t token) const {
    return memory_ + At(id, token);
  }

 private:
  int64_t At(int64_t id, int64_t token) const {
    const int64_t width = RoundUp(std::min(kChunk, vocab_ - id), kRowPadding);
    return exps_at_ + (RoundUp(id, kRowPadding) * tokens_ + token * width) *
                          DTypeBytes(act_);
  }

  char* const memory_;
  const DType act_;
  const int64_t tokens_, vocab_, maxima_at_, exps_at_;
};

// The forward of tokens [begin, end); `logits` holds one chunk.
class ForwardBlock {
 public:
  ForwardBlock(const LogprobHead& head, const LogprobHeadOutput& out,
               int64_t begin, int64_t end)
      : head_(head),
        kept_(out.kept.raw(), head.hidden.dtype(), head.hidden.dim(0),
              head.targets.dim(1), head.weight.dim(0)),
        begin_(begin),
        end_(end),
        num_targets_(head.targets.dim(1)),
        top_k_(out.top_k_logprobs.is_null() ? 0 : out.top_k_logprobs.dim(1)),
        targets_(head.targets.data<int32_t>()),
        logprobs_(out.logprobs.data<float>()),
        lse_(out.lse.data<float>()),
        top_(out.top_k_logprobs.data<float>()),
        top_ids_(out.top_k_indices.data<int32_t>()) {}

  void Run(Gemm& gemm, int thread, float* logits) {
    const int64_t vocab = head_.weight.dim(0);
    const int64_t rows = end_ - begin_;
    std::vector<float> max(static_cast<size_t>(rows), -INFINITY);
    std::vector<float> sum(static_cast<size_t>(rows), 0.0f);
    std::fill_n(top_ + begin_ * top_k_, rows * top_k_, -INFINITY);
    std::fill_n(top_ids_ + begin_ * top_k_, rows * top_k_, 0);
    for (int64_t id = 0; id < vocab; id += kChunk) {
      const int64_t cols = std::min(kChunk, vocab - id);
      const GemmShape shape = LogitShape(head_, rows, cols);
      gemm.RunOne(thread, shape, head_.hidden.Rows(begin_, end_).raw(),
                  head_.weight.Rows(id, id + cols).raw(), logits);
      for (int64_t r = 0; r < rows; ++r) {
        const size_t i = static_cast<size_t>(r);
        const float* row = logits + r * shape.c_row;
        const float top = RowMax(row, cols);
        const float part = RowExp(row, cols, top, head_.hidden.dtype(),
                                  Keep(begin_ + r, id, top));
        if (top > max[i]) {
          sum[i] = sum[i] * std::exp(max[i] - top) + part;
          max[i] = top;
        } else {
          sum[i] += part * std::exp(top - max[i]);
        }
        TakeTargets(begin_ + r, row, id, cols);
        TakeTop(begin_ + r, row, id, cols, top);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const size_t i = static_cast<size_t>(r);
      const int64_t t = begin_ + r;
      lse_[t] = max[i] + std::log(sum[i]);
      for (int64_t j = 0; j < num_targets_; ++j) {
        logprobs_[t * num_targets_ + j] -= lse_[t];
      }
      if (!kept_.empty()) {
        std::copy_n(logprobs_ + t * num_targets_, num_targets_,
                    kept_.logprobs() + t * num_targets_);
      }
      for (int64_t j = 0; j < top_k_; ++j) top_[t * top_k_ + j] -= lse_[t];
    }
  }

 private:
  // Where a row's e of a chunk goes; null if they are not kept.
  char* Keep(int64_t t, int64_t id, float max) {
    if (kept_.empty()) return nullptr;
    kept_.maxima(id)[t] = max;
    return kept_.exps(id, t);
  }

  void TakeTargets(int64_t t, const float* row, int64_t id, int64_t cols) {
    for (int64_t j = 0; j < num_targets_; ++j) {
      const int64_t target = targets_[t * num_targets_ + j] - id;
      if (target >= 0 && target < cols) {
        logprobs_[t * num_targets_ + j] = row[target];
      }
    }
  }

  void TakeTop(int64_t t, const float* row, int64_t id, int64_t cols,
               float top) {
    if (top_k_ == 0) return;
    float* logits = top_ + t * top_k_;
    if (!(top > logits[top_k_ - 1])) return;
    for (int64_t c = 0; c < cols; ++c) {
      InsertTop(row[c], static_cast<int32_t>(id + c), top_k_, logits,
                top_ids_ + t * top_k_);
    }
  }

  const LogprobHead& head_;
  const KeptLogits kept_;
  const int64_t begin_, end_, num_targets_, top_k_;
  const int32_t* const targets_;
  float* const logprobs_;
  float* const lse_;
  float* const top_;
  int32_t* const top_ids_;
};

// d_logit of tokens [first, first + rows) and ids [id, id + cols), act
// [rows, padded ids].
class LogitGrad {
 public:
  LogitGrad(const LogprobHead& head, const Kernels::LogprobHeadGrad& grad)
      : head_(head),
        act_(head.hidden.dtype()),
        k_(head.targets.dim(1)),
        kept_(grad.kept.raw(), act_,
              grad.kept_rows.is_null() ? head.hidden.dim(0) : grad.kept_tokens,
              k_, head.weight.dim(0)),
        kept_rows_(grad.kept_rows.data<int32_t>()),
        targets_(head.targets.data<int32_t>()),
        d_logprobs_(grad.d_logprobs.data<float>()),
        lse_(grad.lse.data<float>()) {}

  // `logits`, f32 [rows, padded ids], is scratch, not used if they were kept;
  // it may be d_logit if act is f32.
  void Run(Gemm& gemm, int thread, int64_t first, int64_t rows, int64_t id,
           int64_t cols, float* logits, char* d_logit) const {
    const int64_t width = RoundUp(cols, kRowPadding);
    if (kept_.empty()) {
      gemm.RunOne(thread, LogitShape(head_, rows, cols),
                  head_.hidden.Rows(first, first + rows).raw(),
                  head_.weight.Rows(id, id + cols).raw(), logits);
    }
    std::vector<std::pair<int64_t, float>> of_targets;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = first + r;
      char* to = d_logit + r * width * DTypeBytes(act_);
      const void* exps = to;
      float max;
      const float* row = logits + r * width;
      float total = 0;
      for (int64_t j = 0; j < k_; ++j) total += d_logprobs_[t * k_ + j];
      of_targets.clear();
      for (int64_t j = 0; j < k_; ++j) {
        const int64_t col = targets_[t * k_ + j] - id;
        if (col < 0 || col >= cols) continue;
        const float logprob = kept_.empty()
                                  ? row[col] - lse_[t]
                                  : kept_.logprobs()[KeptRow(t) * k_ + j];
        of_targets.emplace_back(col,
                                OfTarget(t, j) - total * std::exp(logprob));
      }
      if (kept_.empty()) {
        max = RowMax(row, cols);
        RowExp(row, cols, max, act_, to);
      } else {
        max = kept_.maxima(id)[KeptRow(t)];
        exps = kept_.exps(id, KeptRow(t));
      }
      RowScale(exps, cols, -total * std::exp(max - lse_[t]), act_, to);
      for (const auto& [col, value] : of_targets) {
        if (act_ == DType::kBF16) {
          reinterpret_cast<BFloat16*>(to)[col] = BFloat16(value);
        } else {
          reinterpret_cast<float*>(to)[col] = value;
        }
      }
    }
  }

 private:
  int64_t KeptRow(int64_t t) const {
    return kept_rows_ == nullptr ? t : kept_rows_[t];
  }

  // The sum of d_logprobs over all targets of a token that are its j-th.
  float OfTarget(int64_t t, int64_t j) const {
    const int32_t* targets = targets_ + t * k_;
    float sum = 0;
    for (int64_t other = 0; other < k_; ++other) {
      if (targets[other] == targets[j]) sum += d_logprobs_[t * k_ + other];
    }
    return sum;
  }

  const LogprobHead& head_;
  const DType act_;
  const int64_t k_;
  const KeptLogits kept_;
  const int32_t* const kept_rows_;
  const int32_t* const targets_;
  const float* const d_logprobs_;
  const float* const lse_;
};

// Rows [id, id + cols) of d_weight, from d_logit of tokens [first, first +
// rows).
void RunWeightGrad(Gemm& gemm, ThreadPool& pool, const LogprobHead& args,
                   int64_t first, int64_t rows, int64_t id, int64_t cols,
                   const void* d_logit, const Kernels::WeightGrad& d_weight) {
  const int64_t hidden = args.hidden.dim(1);
  double* squares = nullptr;
  if (!d_weight.squares.is_null()) {
    squares = d_weight.squares.data<double>() + id * SquareBlocks(hidden);
  }
  gemm.Run(pool,
           {.m = cols,
            .n = hidden,
            .k = rows,
            .a_row = 1,
            .a_col = RoundUp(cols, kRowPadding),
            .b_row = hidden,
            .c_row = hidden,
            .ab = args.hidden.dtype(),
            .accumulate = first > 0 || d_weight.accumulate},
           d_logit, args.hidden.Rows(first, first + rows).raw(),
           d_weight.d_w.Rows(id, id + cols).raw(), squares);
}

}  // namespace

int64_t CpuKernels::LogprobHeadWorkspaceBytes(DType act, int64_t tokens,
                                              int64_t hidden,
                                              int64_t vocab) const {
  // A chunk of d_logit; in bf16 the float32 sums of d_hidden as well.
  const int64_t rows = std::min(tokens, kTokens);
  const int64_t cols = RoundUp(std::min(vocab, kChunk), kRowPadding);
  const int64_t d_hidden = act == DType::kF32 ? 0 : rows * hidden * 4;
  return d_hidden + rows * cols * DTypeBytes(act);
}

int64_t CpuKernels::LogprobHeadKeptBytes(DType act, int64_t tokens, int64_t k,
                                         int64_t vocab) const {
  return KeptLogits(nullptr, act, tokens, k, vocab).bytes();
}

int64_t CpuKernels::LogprobHeadWeightRows(DType) const { return kChunk; }

void CpuKernels::LogprobHeadForward(Stream& stream, const LogprobHead& args,
                                    const LogprobHeadOutput& out,
                                    const Tensor&) {
  const int64_t tokens = args.hidden.dim(0);
  if (!stream.ok() || tokens == 0) return;
  GW_CHECK(args.weight.dtype() == args.hidden.dtype());
  GW_CHECK(args.weight.dim(1) == args.hidden.dim(1));
  GW_CHECK(out.top_k_logprobs.is_null() ||
           out.top_k_logprobs.dim(1) <= args.weight.dim(0));
  GW_CHECK(out.kept.is_null() ||
           out.kept.bytes() >= LogprobHeadKeptBytes(args.hidden.dtype(), tokens,
                                                    args.targets.dim(1),
                                                    args.weight.dim(0)));
  ThreadPool& pool = Pool(stream);
  gemm_->Prepare(pool.num_threads());
  // The backward's blocks, since a product's bits may depend on how many rows
  // it has; if they do not, larger ones, which pack the weight less often.
  const int64_t most =
      RowsHaveTheirOwnBits(args.hidden.dtype()) ? 2 * kBlock : kBlock;
  scratch_.Reserve(pool.num_threads(), most * kChunk * 4);
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t last = std::min(tokens, first + kTokens);
    const int64_t block = BlockTokens(last - first, pool.num_threads(), most);
    pool.ParallelItems((last - first + block - 1) / block, [&](int64_t item,
                                                               int thread) {
      const int64_t begin = first + item * block;
      ForwardBlock(args, out, begin, std::min(last, begin + block))
          .Run(*gemm_, thread, reinterpret_cast<float*>(scratch_.part(thread)));
    });
  }
}

void CpuKernels::LogprobHeadBackward(Stream& stream, const LogprobHead& args,
                                     const LogprobHeadGrad& grad,
                                     const Tensor& d_hidden,
                                     const WeightGrad& d_weight) {
  if (!stream.ok()) return;
  const DType act = args.hidden.dtype();
  const int64_t tokens = args.hidden.dim(0), hidden = args.hidden.dim(1);
  const int64_t vocab = args.weight.dim(0);
  const bool f32 = act == DType::kF32;
  GW_CHECK(grad.workspace.bytes() >=
           LogprobHeadWorkspaceBytes(act, tokens, hidden, vocab));
  GW_CHECK(grad.kept.is_null() ||
           grad.kept.bytes() >=
               LogprobHeadKeptBytes(
                   act, grad.kept_rows.is_null() ? tokens : grad.kept_tokens,
                   args.targets.dim(1), vocab));
  ThreadPool& pool = Pool(stream);
  gemm_->Prepare(pool.num_threads());
  scratch_.Reserve(pool.num_threads(), f32 ? 0 : kBlock * kChunk * 4);
  const LogitGrad logit_grad(args, grad);
  if (tokens == 0 && !d_weight.d_w.is_null()) {
    RunWeightGrad(*gemm_, pool, args, 0, 0, 0, vocab, nullptr, d_weight);
  }

  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t rows = std::min(kTokens, tokens - first);
    const int64_t block = BlockTokens(rows, pool.num_threads());
    char* workspace = static_cast<char*>(grad.workspace.raw());
    float* hidden_sums = reinterpret_cast<float*>(workspace);
    if (f32) {
      hidden_sums = d_hidden.data<float>() + first * hidden;
    } else {
      workspace += rows * hidden * 4;
    }
    for (int64_t id = 0; id < vocab; id += kChunk) {
      const int64_t cols = std::min(kChunk, vocab - id);
      const int64_t width = RoundUp(cols, kRowPadding);
      pool.ParallelItems(
          (rows + block - 1) / block, [&](int64_t item, int thread) {
            const int64_t begin = item * block;
            const int64_t n = std::min(block, rows - begin);
            char* d_logit = workspace + begin * width * DTypeBytes(act);
            float* logits =
                reinterpret_cast<float*>(f32 ? d_logit : scratch_.part(thread));
            const Tensor weight = args.weight.Rows(id, id + cols);
            logit_grad.Run(*gemm_, thread, first + begin, n, id, cols, logits,
                           d_logit);
            gemm_->RunOne(thread,
                          {.m = n,
                           .n = hidden,
                           .k = cols,
                           .a_row = width,
                           .b_row = hidden,
                           .c_row = hidden,
                           .ab = act,
                           .accumulate = id > 0},
                          d_logit, weight.raw(), hidden_sums + begin * hidden);
          });
      if (d_weight.d_w.is_null()) continue;
      RunWeightGrad(*gemm_, pool, args, first, rows, id, cols, workspace,
                    d_weight);
    }
    if (f32) continue;
    const Tensor out = d_hidden.Rows(first, first + rows);
    pool.ParallelFor(rows, 1, [&](int64_t begin, int64_t end) {
      StoreRows(act, {.cols = (end - begin) * hidden,
                      .from = hidden_sums + begin * hidden,
                      .to = out.Rows(begin, end).raw()});
    });
  }
}

void CpuKernels::LogprobHeadBackwardWeight(Stream& stream,
                                           const LogprobHead& args,
                                           const LogprobHeadGrad& grad,
                                           int64_t begin, int64_t end,
                                           const WeightGrad& d_weight) {
  if (!stream.ok()) return;
  const int64_t tokens = args.hidden.dim(0), vocab = args.weight.dim(0);
  GW_CHECK(!grad.kept.is_null());
  GW_CHECK(begin % kChunk == 0 && (end % kChunk == 0 || end == vocab));
  ThreadPool& pool = Pool(stream);
  gemm_->Prepare(pool.num_threads());
  scratch_.Reserve(pool.num_threads(), kBlock * kChunk * 4);
  const LogitGrad logit_grad(args, grad);
  if (tokens == 0) {
    RunWeightGrad(*gemm_, pool, args, 0, 0, begin, end - begin, nullptr,
                  d_weight);
  }
  char* const d_logit = static_cast<char*>(grad.workspace.raw());
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t rows = std::min(kTokens, tokens - first);
    const int64_t block = BlockTokens(rows, pool.num_threads());
    for (int64_t id = begin; id < end; id += kChunk) {
      const int64_t cols = std::min(kChunk, end - id);
      const int64_t row_bytes =
          RoundUp(cols, kRowPadding) * DTypeBytes(args.hidden.dtype());
      pool.ParallelItems(
          (rows + block - 1) / block, [&](int64_t item, int thread) {
            const int64_t at = item * block;
            logit_grad.Run(*gemm_, thread, first + at,
                           std::min(block, rows - at), id, cols,
                           reinterpret_cast<float*>(scratch_.part(thread)),
                           d_logit + at * row_bytes);
          });
      RunWeightGrad(*gemm_, pool, args, first, rows, id, cols, d_logit,
                    d_weight);
    }
  }
}

}  // namespace gradwire
