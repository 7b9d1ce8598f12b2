// SPDX-License-Identifier: Apache-2.0
// The tiles of attention backward. Scores are recomputed; with them
//   p = exp(scale q.k - lse), d_p = d_out v^T,
//   d_s = scale p (d_p - sum(d_out out)),
//   d_q = d_s k, d_k = d_s^T q, d_v = p^T d_out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/softmax_tile.h"
#include "kernels/kernels.h"

namespace gradwire {

// One sequence and key-value head.
struct AttentionSlice {
  int64_t begin;
  int64_t length;
  int64_t kv_head;
};

// The operands and results of one op, as a thread sees them.
class AttentionBackwardWorker {
 public:
  AttentionBackwardWorker(const AttentionTiles& tiles,
                          const Kernels::Attention& args,
                          const Kernels::AttentionGrad& grad,
                          const Tensor& d_qkv)
      : t_(tiles), args_(args), grad_(grad), d_qkv_(d_qkv) {
    // Where d_k and d_v are summed, in float32.
    if (t_.act == DType::kF32) {
      sums_ = d_qkv.data<float>() + t_.k_offset(0);
      sums_width_ = t_.qkv_width();
    } else {
      sums_ = args.workspace.data<float>();
      sums_width_ = 2 * t_.shape.kv_heads * t_.shape.head_dim;
    }
  }

  // Sets the buffers; returns their bytes. A null part only counts.
  int64_t SetScratch(char* part) {
    ScratchCursor cursor(part);
    const int64_t dim = t_.shape.head_dim, keys = AttentionTiles::kKeys;
    const int64_t bytes = t_.act_bytes();
    q_ = cursor.Take<char>(t_.rows() * dim * bytes);
    d_out_ = cursor.Take<char>(t_.rows() * dim * bytes);
    k_ = cursor.Take<char>(keys * dim * bytes);
    v_ = cursor.Take<char>(keys * dim * bytes);
    scores_ = cursor.Take<float>(t_.rows() * keys);
    d_probs_ = cursor.Take<float>(t_.rows() * keys);
    if (t_.act == DType::kBF16) {
      narrow_probs_ = cursor.Take<BFloat16>(t_.rows() * keys);
      narrow_d_scores_ = cursor.Take<BFloat16>(t_.rows() * keys);
    }
    d_q_ = cursor.Take<float>(t_.rows() * dim);
    d_k_ = cursor.Take<float>(keys * dim);
    d_v_ = cursor.Take<float>(keys * dim);
    lse_ = cursor.Take<float>(t_.rows());
    delta_ = cursor.Take<float>(t_.rows());
    return cursor.used();
  }

  void Start(Gemm* gemm, int thread) {
    gemm_ = gemm;
    thread_ = thread;
  }

  // By head: everything of one sequence and key-value head.
  void RunHead(const AttentionSlice& slice) {
    slice_ = slice;
    const int64_t dim = t_.shape.head_dim;
    for (int64_t i = 0; i < slice.length; ++i) {
      std::fill_n(KeySum(i), dim, 0.0f);
      std::fill_n(ValueSum(i), dim, 0.0f);
    }
    for (int64_t query = 0; query < slice.length; query += t_.query_tokens) {
      LoadQueries(query);
      for (int64_t key = 0; key < query + tokens_;
           key += AttentionTiles::kKeys) {
        LoadKeys(key, query + tokens_);
        ComputeTile();
        AddQueryGrad(/*first=*/key == 0);
        if (t_.own_products) {
          AddKeyGrad(/*first=*/false, KeySum(key), ValueSum(key), sums_width_);
        } else {
          // Products of padded keys: past the sequence are another's sums.
          AddKeyGrad(/*first=*/true, d_k_, d_v_, dim);
          AddRows(d_k_, keys_, dim, KeySum(key), sums_width_);
          AddRows(d_v_, keys_, dim, ValueSum(key), sums_width_);
        }
      }
      StoreQueryGrad();
    }
    if (t_.act == DType::kF32) return;
    StoreKeyGrad(0, slice.length, KeySum(0), ValueSum(0), sums_width_);
  }

  // By block, first pass: d_q of one block of queries.
  void RunQueries(const AttentionSlice& slice, int64_t query) {
    slice_ = slice;
    LoadQueries(query);
    for (int64_t key = 0; key < query + tokens_; key += AttentionTiles::kKeys) {
      LoadKeys(key, query + tokens_);
      ComputeTile();
      AddQueryGrad(/*first=*/key == 0);
    }
    StoreQueryGrad();
  }

  // By block, second pass: d_k and d_v of one block of keys.
  void RunKeys(const AttentionSlice& slice, int64_t key) {
    slice_ = slice;
    LoadKeys(key, slice.length);
    const int64_t first = key / t_.query_tokens * t_.query_tokens;
    for (int64_t query = first; query < slice.length;
         query += t_.query_tokens) {
      LoadQueries(query);
      ComputeTile();
      AddKeyGrad(/*first=*/query == first, d_k_, d_v_, t_.shape.head_dim);
    }
    StoreKeyGrad(key, keys_, d_k_, d_v_, t_.shape.head_dim);
  }

 private:
  int64_t rows() const { return t_.PadQueries(tokens_) * t_.group; }
  int64_t cols() const { return t_.PadKeys(keys_); }
  const void* probs() const {
    return narrow_probs_ ? static_cast<void*>(narrow_probs_) : scores_;
  }
  const void* d_scores() const {
    return narrow_d_scores_ ? static_cast<void*>(narrow_d_scores_) : d_probs_;
  }
  float* KeySum(int64_t i) const {
    return sums_ + (slice_.begin + i) * sums_width_ +
           slice_.kv_head * t_.shape.head_dim;
  }
  float* ValueSum(int64_t i) const {
    return KeySum(i) + t_.shape.kv_heads * t_.shape.head_dim;
  }
  CausalSkip Skip(CausalSkip::Of of) const {
    return {.of = of, .visible = query_ - key_ + 1, .group = t_.group};
  }

  void LoadQueries(int64_t query) {
    query_ = query;
    tokens_ = std::min(t_.query_tokens, slice_.length - query);
    const int64_t dim = t_.shape.head_dim, width = t_.group * dim;
    const int64_t padded = t_.PadQueries(tokens_);
    const int64_t first = slice_.begin + query;
    t_.Pack(args_.qkv.raw(),
            first * t_.qkv_width() + t_.q_offset(slice_.kv_head),
            {tokens_, padded, width, t_.qkv_width()}, q_);
    const AttentionTiles::Rows rows_of_out = {tokens_, padded, width,
                                              t_.out_width()};
    const int64_t at = first * t_.out_width() + t_.q_offset(slice_.kv_head);
    t_.Pack(grad_.d_out.raw(), at, rows_of_out, d_out_);
    // `out` is needed only for delta; it borrows the room of d_q.
    t_.Pack(grad_.out.raw(), at, rows_of_out, d_q_);
    RowDots(t_.act, d_out_, d_q_, rows(), dim, delta_);
    std::fill_n(lse_, rows(), 0.0f);
    for (int64_t i = 0; i < tokens_; ++i) {
      std::copy_n(grad_.lse.data<float>() + (first + i) * t_.shape.heads +
                      slice_.kv_head * t_.group,
                  t_.group, lse_ + i * t_.group);
    }
  }

  // Keys from `key` to the end of the block or `limit`.
  void LoadKeys(int64_t key, int64_t limit) {
    key_ = key;
    keys_ = std::min(AttentionTiles::kKeys, limit - key);
    block_ = t_.KeysAt(args_.qkv.raw(), slice_.begin + key, slice_.kv_head,
                       keys_, k_, v_);
  }

  // p and d_s of the tile.
  void ComputeTile() {
    const int64_t dim = t_.shape.head_dim;
    const GemmShape shape = {.m = rows(),
                             .n = block_.n,
                             .k = dim,
                             .a_row = dim,
                             .b_row = 1,
                             .b_col = block_.row,
                             .c_row = cols(),
                             .ab = t_.act};
    const CausalSkip skip = Skip(CausalSkip::Of::kResult);
    gemm_->RunOne(thread_, shape, q_, block_.k, scores_, &skip);
    gemm_->RunOne(thread_, shape, d_out_, block_.v, d_probs_, &skip);
    SoftmaxBackward({.shape = {.tokens = t_.PadQueries(tokens_),
                               .group = t_.group,
                               .cols = cols(),
                               .visible = skip.visible,
                               .scale = t_.shape.scale},
                     .scores = scores_,
                     .d_probs = d_probs_,
                     .probs = narrow_probs_,
                     .d_scores = narrow_d_scores_,
                     .lse = lse_,
                     .delta = delta_});
  }

  void AddQueryGrad(bool first) {
    const int64_t dim = t_.shape.head_dim;
    const CausalSkip skip = Skip(CausalSkip::Of::kLeft);
    gemm_->RunOne(thread_,
                  {.m = rows(),
                   .n = dim,
                   .k = block_.n,
                   .a_row = cols(),
                   .b_row = block_.row,
                   .c_row = dim,
                   .ab = t_.act,
                   .accumulate = !first},
                  d_scores(), block_.k, d_q_, &skip);
  }

  // To d_k and d_v, f32 [block_.n, head_dim] with `row` elements from row to
  // row.
  void AddKeyGrad(bool first, float* d_k, float* d_v, int64_t row) {
    const int64_t dim = t_.shape.head_dim;
    const CausalSkip skip = Skip(CausalSkip::Of::kLeftTransposed);
    const GemmShape shape = {.m = block_.n,
                             .n = dim,
                             .k = rows(),
                             .a_row = 1,
                             .a_col = cols(),
                             .b_row = dim,
                             .c_row = row,
                             .ab = t_.act,
                             .accumulate = !first};
    gemm_->RunOne(thread_, shape, probs(), d_out_, d_v, &skip);
    gemm_->RunOne(thread_, shape, d_scores(), q_, d_k, &skip);
  }

  void StoreQueryGrad() {
    const int64_t width = t_.group * t_.shape.head_dim;
    Store(query_, t_.q_offset(slice_.kv_head),
          {.rows = tokens_, .cols = width, .from = d_q_, .from_row = width});
  }

  // Of `keys` keys from `key` on; `row` as for AddKeyGrad.
  void StoreKeyGrad(int64_t key, int64_t keys, const float* d_k,
                    const float* d_v, int64_t row) {
    const int64_t dim = t_.shape.head_dim;
    Store(key, t_.k_offset(slice_.kv_head),
          {.rows = keys, .cols = dim, .from = d_k, .from_row = row});
    Store(key, t_.v_offset(slice_.kv_head),
          {.rows = keys, .cols = dim, .from = d_v, .from_row = row});
  }

  // To d_qkv, from a token and an offset in its row on.
  void Store(int64_t token, int64_t offset, RowsToStore rows) {
    rows.to =
        static_cast<char*>(d_qkv_.raw()) +
        ((slice_.begin + token) * t_.qkv_width() + offset) * t_.act_bytes();
    rows.to_row = t_.qkv_width();
    StoreRows(t_.act, rows);
  }

  const AttentionTiles& t_;
  const Kernels::Attention& args_;
  const Kernels::AttentionGrad& grad_;
  const Tensor& d_qkv_;
  float* sums_ = nullptr;
  int64_t sums_width_ = 0;
  Gemm* gemm_ = nullptr;
  int thread_ = 0;

  // The tile at hand: `tokens_` queries from `query_`, `keys_` keys from
  // `key_`.
  AttentionSlice slice_ = {};
  int64_t query_ = 0, tokens_ = 0, key_ = 0, keys_ = 0;
  AttentionTiles::Keys block_ = {};
  char *q_ = nullptr, *d_out_ = nullptr, *k_ = nullptr, *v_ = nullptr;
  float *scores_ = nullptr, *d_probs_ = nullptr;
  BFloat16 *narrow_probs_ = nullptr, *narrow_d_scores_ = nullptr;
  float *d_q_ = nullptr, *d_k_ = nullptr, *d_v_ = nullptr;
  float *lse_ = nullptr, *delta_ = nullptr;
};

}  // namespace gradwire
