// SPDX-License-Identifier: Apache-2.0
// Attention forward with an online softmax: a block of queries visits the
// blocks of keys it can see and keeps only a running maximum, sum and output.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/gemm.h"

namespace gradwire {
namespace {

struct Item {
  int64_t begin;  // first row of the sequence
  int64_t query;  // first query of the block, within the sequence
  int64_t tokens;
  int64_t kv_head;
};

// Most expensive first, so that threads finish together.
std::vector<Item> QueryBlocks(const SequenceLayout& layout,
                              const AttentionTiles& tiles) {
  std::vector<Item> items;
  for (int64_t s = 0; s < layout.num_sequences; ++s) {
    const int64_t begin = layout.cu_seqlens[s];
    const int64_t length = layout.cu_seqlens[s + 1] - begin;
    for (int64_t query = 0; query < length; query += tiles.query_tokens) {
      const int64_t tokens = std::min(tiles.query_tokens, length - query);
      for (int64_t head = 0; head < tiles.shape.kv_heads; ++head) {
        items.push_back({begin, query, tokens, head});
      }
    }
  }
  std::stable_sort(
      items.begin(), items.end(),
      [](const Item& a, const Item& b) { return a.query > b.query; });
  return items;
}

struct Buffers {
  explicit Buffers(const AttentionTiles& t, char* part = nullptr) {
    ScratchCursor cursor(part);
    const int64_t dim = t.shape.head_dim;
    q = cursor.Take<char>(t.rows() * dim * t.act_bytes());
    k = cursor.Take<char>(AttentionTiles::kKeys * dim * t.act_bytes());
    v = cursor.Take<char>(AttentionTiles::kKeys * dim * t.act_bytes());
    scores = cursor.Take<float>(t.rows() * AttentionTiles::kKeys);
    probs = t.act == DType::kBF16
                ? cursor.Take<BFloat16>(t.rows() * AttentionTiles::kKeys)
                : nullptr;
    out = cursor.Take<float>(t.rows() * dim);
    max = cursor.Take<float>(t.rows());
    sum = cursor.Take<float>(t.rows());
    bytes = cursor.used();
  }

  char *q, *k, *v;
  float* scores;
  BFloat16* probs;
  float *out, *max, *sum;
  int64_t bytes;
};

}  // namespace

int64_t CpuKernels::AttentionWorkspaceBytes(const AttentionShape& shape,
                                            DType act, int64_t tokens) const {
  // Where the backward sums d_k and d_v; in f32 it sums them in d_qkv.
  if (act == DType::kF32) return 0;
  return tokens * 2 * shape.kv_heads * shape.head_dim * 4;
}

void CpuKernels::AttentionForward(Stream& stream, const Attention& args,
                                  const Tensor& out, const Tensor& lse) {
  if (!stream.ok()) return;
  const AttentionTiles tiles(args.shape, args.qkv.dtype(),
                             gemm_->IsOwn(args.qkv.dtype()));
  GW_CHECK(args.shape.heads % args.shape.kv_heads == 0);
  GW_CHECK(args.qkv.dim(1) == tiles.qkv_width());
  GW_CHECK(out.dim(1) == tiles.out_width() && out.dtype() == tiles.act);
  const int64_t dim = tiles.shape.head_dim;
  const int64_t group = tiles.group;
  const void* qkv = args.qkv.raw();
  ThreadPool& pool = Pool(stream);
  gemm_->Prepare(pool.num_threads());
  scratch_.Reserve(pool.num_threads(), Buffers(tiles).bytes);
  const std::vector<Item> items = QueryBlocks(args.layout, tiles);
  pool.ParallelItems(static_cast<int64_t>(items.size()), [&](int64_t index,
                                                             int thread) {
    const Item& item = items[static_cast<size_t>(index)];
    const Buffers b(tiles, scratch_.part(thread));
    const int64_t width = tiles.qkv_width();
    const int64_t padded = tiles.PadQueries(item.tokens);
    const int64_t rows = padded * group;
    tiles.Pack(qkv,
               (item.begin + item.query) * width + tiles.q_offset(item.kv_head),
               {item.tokens, padded, group * dim, width}, b.q);
    std::fill_n(b.max, rows, -INFINITY);
    std::fill_n(b.sum, rows, 0.0f);
    const int64_t seen = item.query + item.tokens;
    for (int64_t key = 0; key < seen; key += AttentionTiles::kKeys) {
      const int64_t keys = std::min(AttentionTiles::kKeys, seen - key);
      const int64_t cols = tiles.PadKeys(keys);
      const AttentionTiles::Keys block =
          tiles.KeysAt(qkv, item.begin + key, item.kv_head, keys, b.k, b.v);
      CausalSkip skip = {.of = CausalSkip::Of::kResult,
                         .visible = item.query - key + 1,
                         .group = group};
      gemm_->RunOne(thread,
                    {.m = rows,
                     .n = block.n,
                     .k = dim,
                     .a_row = dim,
                     .b_row = 1,
                     .b_col = block.row,
                     .c_row = cols,
                     .ab = tiles.act},
                    b.q, block.k, b.scores, &skip);
      SoftmaxForward({.shape = {.tokens = padded,
                                .group = group,
                                .cols = cols,
                                .visible = skip.visible,
                                .scale = tiles.shape.scale},
                      .scores = b.scores,
                      .probs = b.probs,
                      .max = b.max,
                      .sum = b.sum,
                      .out = b.out,
                      .head_dim = dim});
      const void* probs = b.probs;
      if (probs == nullptr) probs = b.scores;
      skip.of = CausalSkip::Of::kLeft;
      gemm_->RunOne(thread,
                    {.m = rows,
                     .n = dim,
                     .k = block.n,
                     .a_row = cols,
                     .b_row = block.row,
                     .c_row = dim,
                     .ab = tiles.act,
                     .accumulate = key > 0},
                    probs, block.v, b.out, &skip);
    }
    for (int64_t r = 0; r < item.tokens * group; ++r) {
      const int64_t token = item.begin + item.query + r / group;
      const int64_t head = item.kv_head * group + r % group;
      lse.data<float>()[token * tiles.shape.heads + head] =
          b.max[r] + std::log(b.sum[r]);
    }
    StoreRows(tiles.act, {.rows = item.tokens,
                          .cols = group * dim,
                          .from = b.out,
                          .from_row = group * dim,
                          .to = static_cast<char*>(out.raw()) +
                                ((item.begin + item.query) * tiles.out_width() +
                                 tiles.q_offset(item.kv_head)) *
                                    tiles.act_bytes(),
                          .to_row = tiles.out_width(),
                          .divisors = b.sum,
                          .run = dim});
  });
}

}  // namespace gradwire
