// SPDX-License-Identifier: Apache-2.0
// Attention backward. Scores are recomputed tile by tile; with them
//   p = exp(scale q.k - lse), d_p = d_out v^T,
//   d_s = scale p (d_p - sum(d_out out)),
//   d_q = d_s k, d_k = d_s^T q, d_v = p^T d_out.
//
// Two schedules, both free of races and with one order of sums:
//   by head   an item is a sequence and a key-value head: five products a tile,
//             d_k and d_v summed in memory over the blocks of queries
//   by block  a pass over blocks of queries for d_q, then one over blocks of
//             keys for d_k and d_v: seven products a tile, but as many items as
//             there are blocks
// The first is less work, the second keeps many cores busy when there are few
// sequences and heads.
#include <algorithm>
#include <cstdint>
#include <queue>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/gemm.h"

namespace gradwire {
namespace {

// One sequence and key-value head.
struct Slice {
  int64_t begin;
  int64_t length;
  int64_t kv_head;
};

// Longest first.
std::vector<Slice> Slices(const SequenceLayout& layout, int64_t kv_heads) {
  std::vector<Slice> slices;
  for (int64_t s = 0; s < layout.num_sequences; ++s) {
    const int64_t begin = layout.cu_seqlens[s];
    const int64_t length = layout.cu_seqlens[s + 1] - begin;
    if (length == 0) continue;
    for (int64_t head = 0; head < kv_heads; ++head) {
      slices.push_back({begin, length, head});
    }
  }
  std::stable_sort(
      slices.begin(), slices.end(),
      [](const Slice& a, const Slice& b) { return a.length > b.length; });
  return slices;
}

// Whether the longest thread of the schedule by head takes no longer than the
// even share of the schedule by block.
bool PrefersHeads(const std::vector<Slice>& slices, int threads) {
  std::priority_queue<double, std::vector<double>, std::greater<>> load;
  for (int t = 0; t < threads; ++t) load.push(0);
  double total = 0, longest = 0;
  for (const Slice& slice : slices) {
    const double cost = static_cast<double>(slice.length) *
                        static_cast<double>(slice.length + 1);
    const double busy = load.top() + cost;
    load.pop();
    load.push(busy);
    longest = std::max(longest, busy);
    total += cost;
  }
  return longest * 5 <= total / threads * 7;
}

// The operands and results of one op, as a thread sees them.
class Worker {
 public:
  Worker(const AttentionTiles& tiles, const Kernels::Attention& args,
         const Kernels::AttentionGrad& grad, const Tensor& d_qkv)
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
  void RunHead(const Slice& slice) {
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
        AddKeyGrad(/*first=*/true);
        for (int64_t i = 0; i < keys_; ++i) {
          AddTo(d_k_ + i * dim, dim, KeySum(key + i));
          AddTo(d_v_ + i * dim, dim, ValueSum(key + i));
        }
      }
      StoreQueryGrad();
    }
    if (t_.act == DType::kF32) return;
    for (int64_t i = 0; i < slice.length; ++i) {
      StoreKeyGrad(i, KeySum(i), ValueSum(i));
    }
  }

  // By block, first pass: d_q of one block of queries.
  void RunQueries(const Slice& slice, int64_t query) {
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
  void RunKeys(const Slice& slice, int64_t key) {
    slice_ = slice;
    LoadKeys(key, slice.length);
    const int64_t first = key / t_.query_tokens * t_.query_tokens;
    for (int64_t query = first; query < slice.length;
         query += t_.query_tokens) {
      LoadQueries(query);
      ComputeTile();
      AddKeyGrad(/*first=*/query == first);
    }
    const int64_t dim = t_.shape.head_dim;
    for (int64_t i = 0; i < keys_; ++i) {
      StoreKeyGrad(key + i, d_k_ + i * dim, d_v_ + i * dim);
    }
  }

 private:
  int64_t rows() const { return AttentionTiles::Pad(tokens_) * t_.group; }
  int64_t cols() const { return AttentionTiles::Pad(keys_); }
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
  char* GradAt(int64_t token, int64_t offset) const {
    return static_cast<char*>(d_qkv_.raw()) +
           ((slice_.begin + token) * t_.qkv_width() + offset) * t_.act_bytes();
  }

  void LoadQueries(int64_t query) {
    query_ = query;
    tokens_ = std::min(t_.query_tokens, slice_.length - query);
    const int64_t dim = t_.shape.head_dim, width = t_.group * dim;
    const int64_t first = slice_.begin + query;
    t_.Pack(args_.qkv.raw(),
            first * t_.qkv_width() + t_.q_offset(slice_.kv_head),
            t_.qkv_width(), tokens_, width, q_);
    // `out` is needed only for delta; it borrows the room of d_q.
    const int64_t at = first * t_.out_width() + t_.q_offset(slice_.kv_head);
    t_.Pack(grad_.d_out.raw(), at, t_.out_width(), tokens_, width, d_out_);
    t_.Pack(grad_.out.raw(), at, t_.out_width(), tokens_, width, d_q_);
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
    const int64_t row = (slice_.begin + key) * t_.qkv_width();
    t_.Pack(args_.qkv.raw(), row + t_.k_offset(slice_.kv_head), t_.qkv_width(),
            keys_, t_.shape.head_dim, k_);
    t_.Pack(args_.qkv.raw(), row + t_.v_offset(slice_.kv_head), t_.qkv_width(),
            keys_, t_.shape.head_dim, v_);
  }

  // p and d_s of the tile.
  void ComputeTile() {
    const int64_t dim = t_.shape.head_dim;
    const GemmShape shape = {.m = rows(),
                             .n = cols(),
                             .k = dim,
                             .a_row = dim,
                             .b_row = 1,
                             .b_col = dim,
                             .c_row = cols(),
                             .ab = t_.act};
    gemm_->RunOne(thread_, shape, q_, k_, scores_);
    gemm_->RunOne(thread_, shape, d_out_, v_, d_probs_);
    SoftmaxBackward({.shape = {.tokens = AttentionTiles::Pad(tokens_),
                               .group = t_.group,
                               .cols = cols(),
                               .visible = query_ - key_ + 1,
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
    gemm_->RunOne(thread_,
                  {.m = rows(),
                   .n = dim,
                   .k = cols(),
                   .a_row = cols(),
                   .b_row = dim,
                   .c_row = dim,
                   .ab = t_.act,
                   .accumulate = !first},
                  d_scores(), k_, d_q_);
  }

  void AddKeyGrad(bool first) {
    const int64_t dim = t_.shape.head_dim;
    const GemmShape shape = {.m = cols(),
                             .n = dim,
                             .k = rows(),
                             .a_row = 1,
                             .a_col = cols(),
                             .b_row = dim,
                             .c_row = dim,
                             .ab = t_.act,
                             .accumulate = !first};
    gemm_->RunOne(thread_, shape, probs(), d_out_, d_v_);
    gemm_->RunOne(thread_, shape, d_scores(), q_, d_k_);
  }

  void StoreQueryGrad() {
    const int64_t width = t_.group * t_.shape.head_dim;
    for (int64_t i = 0; i < tokens_; ++i) {
      ScaleTo(t_.act, d_q_ + i * width, width, 1.0f,
              GradAt(query_ + i, t_.q_offset(slice_.kv_head)));
    }
  }

  void StoreKeyGrad(int64_t token, const float* d_k, const float* d_v) {
    const int64_t dim = t_.shape.head_dim;
    ScaleTo(t_.act, d_k, dim, 1.0f, GradAt(token, t_.k_offset(slice_.kv_head)));
    ScaleTo(t_.act, d_v, dim, 1.0f, GradAt(token, t_.v_offset(slice_.kv_head)));
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
  Slice slice_ = {};
  int64_t query_ = 0, tokens_ = 0, key_ = 0, keys_ = 0;
  char *q_ = nullptr, *d_out_ = nullptr, *k_ = nullptr, *v_ = nullptr;
  float *scores_ = nullptr, *d_probs_ = nullptr;
  BFloat16 *narrow_probs_ = nullptr, *narrow_d_scores_ = nullptr;
  float *d_q_ = nullptr, *d_k_ = nullptr, *d_v_ = nullptr;
  float *lse_ = nullptr, *delta_ = nullptr;
};

struct Block {
  size_t slice;
  int64_t at;
};

}  // namespace

void CpuKernels::AttentionBackward(Stream& stream, const Attention& args,
                                   const AttentionGrad& grad,
                                   const Tensor& d_qkv) {
  if (!stream.ok()) return;
  const AttentionTiles tiles(args.shape, args.qkv.dtype());
  GW_CHECK(args.workspace.bytes() >=
           AttentionWorkspaceBytes(args.shape, tiles.act, args.qkv.dim(0)));
  GW_CHECK(d_qkv.dtype() == tiles.act && d_qkv.dim(1) == tiles.qkv_width());
  ThreadPool& pool = Pool(stream);
  const int threads = pool.num_threads();
  gemm_->Prepare(threads);
  std::vector<Worker> workers(static_cast<size_t>(threads),
                              Worker(tiles, args, grad, d_qkv));
  scratch_.Reserve(threads, workers[0].SetScratch(nullptr));
  for (int t = 0; t < threads; ++t) {
    workers[static_cast<size_t>(t)].SetScratch(scratch_.part(t));
    workers[static_cast<size_t>(t)].Start(gemm_.get(), t);
  }
  const std::vector<Slice> slices = Slices(args.layout, args.shape.kv_heads);
  if (PrefersHeads(slices, threads)) {
    pool.ParallelItems(static_cast<int64_t>(slices.size()),
                       [&](int64_t item, int thread) {
                         workers[static_cast<size_t>(thread)].RunHead(
                             slices[static_cast<size_t>(item)]);
                       });
    return;
  }
  // The long blocks first: late queries see many keys, early keys are seen by
  // many queries.
  std::vector<Block> query_blocks, key_blocks;
  for (size_t s = 0; s < slices.size(); ++s) {
    const int64_t length = slices[s].length;
    for (int64_t at = 0; at < length; at += tiles.query_tokens) {
      query_blocks.push_back({s, at});
    }
    for (int64_t at = 0; at < length; at += AttentionTiles::kKeys) {
      key_blocks.push_back({s, at});
    }
  }
  std::stable_sort(query_blocks.begin(), query_blocks.end(),
                   [](const Block& a, const Block& b) { return a.at > b.at; });
  std::stable_sort(key_blocks.begin(), key_blocks.end(),
                   [&](const Block& a, const Block& b) {
                     return slices[a.slice].length - a.at >
                            slices[b.slice].length - b.at;
                   });
  const int64_t num_query_blocks = static_cast<int64_t>(query_blocks.size());
  const int64_t num_key_blocks = static_cast<int64_t>(key_blocks.size());
  pool.ParallelItems(num_query_blocks + num_key_blocks, [&](int64_t item,
                                                            int thread) {
    Worker& worker = workers[static_cast<size_t>(thread)];
    if (item < num_key_blocks) {
      const Block& b = key_blocks[static_cast<size_t>(item)];
      worker.RunKeys(slices[b.slice], b.at);
    } else {
      const Block& b = query_blocks[static_cast<size_t>(item - num_key_blocks)];
      worker.RunQueries(slices[b.slice], b.at);
    }
  });
}

}  // namespace gradwire
