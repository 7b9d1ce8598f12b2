// SPDX-License-Identifier: Apache-2.0
// Attention backward: who computes which tiles.
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
#include "kernels/cpu/attention_backward_worker.h"
#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/gemm.h"

namespace gradwire {
namespace {

// Longest first.
std::vector<AttentionSlice> Slices(const SequenceLayout& layout,
                                   int64_t kv_heads) {
  std::vector<AttentionSlice> slices;
  for (int64_t s = 0; s < layout.num_sequences; ++s) {
    const int64_t begin = layout.cu_seqlens[s];
    const int64_t length = layout.cu_seqlens[s + 1] - begin;
    if (length == 0) continue;
    for (int64_t head = 0; head < kv_heads; ++head) {
      slices.push_back({begin, length, head});
    }
  }
  std::stable_sort(slices.begin(), slices.end(),
                   [](const AttentionSlice& a, const AttentionSlice& b) {
                     return a.length > b.length;
                   });
  return slices;
}

// Whether the longest thread of the schedule by head takes no longer than the
// even share of the schedule by block.
bool PrefersHeads(const std::vector<AttentionSlice>& slices, int threads) {
  std::priority_queue<double, std::vector<double>, std::greater<>> load;
  for (int t = 0; t < threads; ++t) load.push(0);
  double total = 0, longest = 0;
  for (const AttentionSlice& slice : slices) {
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

struct Block {
  size_t slice;
  int64_t at;
};

}  // namespace

void CpuKernels::AttentionBackward(Stream& stream, const Attention& args,
                                   const AttentionGrad& grad,
                                   const Tensor& d_qkv) {
  if (!stream.ok()) return;
  const AttentionTiles tiles(args.shape, args.qkv.dtype(),
                             gemm_->IsOwn(args.qkv.dtype()));
  GW_CHECK(args.workspace.bytes() >=
           AttentionWorkspaceBytes(args.shape, tiles.act, args.qkv.dim(0)));
  GW_CHECK(d_qkv.dtype() == tiles.act && d_qkv.dim(1) == tiles.qkv_width());
  ThreadPool& pool = Pool(stream);
  const int threads = pool.num_threads();
  gemm_->Prepare(threads);
  std::vector<AttentionBackwardWorker> workers(
      static_cast<size_t>(threads),
      AttentionBackwardWorker(tiles, args, grad, d_qkv));
  scratch_.Reserve(threads, workers[0].SetScratch(nullptr));
  for (int t = 0; t < threads; ++t) {
    workers[static_cast<size_t>(t)].SetScratch(scratch_.part(t));
    workers[static_cast<size_t>(t)].Start(gemm_.get(), t);
  }
  const std::vector<AttentionSlice> slices =
      Slices(args.layout, args.shape.kv_heads);
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
    AttentionBackwardWorker& worker = workers[static_cast<size_t>(thread)];
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
