// SPDX-License-Identifier: Apache-2.0
// What attention's kernels are called with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "base/check.h"
#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_tile_cache.h"
#include "kernels/kernels.h"

namespace gradwire {

// Of a query in the backward: p = 2^(scale log2(e) q.k - lse2), and
// delta = d_out . out.
struct alignas(8) AttentionRowStats {
  float lse2;
  float delta;
};

inline constexpr float kLog2E = 1.44269504088896340736f;

// Rows of one head, or of their gradients, in a sequence.
template <typename T>
struct HeadRows {
  T* data;         // row 0
  int64_t stride;  // from row to row, in elements
  int length;      // rows
  int head_dim;    // elements of a row

  __device__ T* Row(int i) const { return data + i * stride; }
};

template <typename T>
struct AttentionArgs {
  const T* qkv;                // [tokens, QkvWidth]
  const AttentionTile* tiles;  // on the device
  int64_t tokens;
  int heads;
  int kv_heads;
  int head_dim;
  float scale;

  // Head `head` of [q | k | v], or of a tensor of the same form.
  template <typename V>
  __device__ HeadRows<V> InQkv(V* tensor, const AttentionTile& tile,
                               int head) const {
    const int64_t width = int64_t{heads + 2 * kv_heads} * head_dim;
    return {tensor + tile.first * width + int64_t{head} * head_dim, width,
            tile.length, head_dim};
  }
  // Head `head` of a tensor [tokens, heads * head_dim].
  template <typename V>
  __device__ HeadRows<V> InOut(V* tensor, const AttentionTile& tile,
                               int head) const {
    const int64_t width = int64_t{heads} * head_dim;
    return {tensor + tile.first * width + int64_t{head} * head_dim, width,
            tile.length, head_dim};
  }
  __device__ int group() const { return heads / kv_heads; }
  // Places of a key-value head among the heads of qkv.
  __device__ int KeyPlace(int kv_head) const { return heads + kv_head; }
  __device__ int ValuePlace(int kv_head) const {
    return heads + kv_heads + kv_head;
  }
};

template <typename T>
struct AttentionForwardArgs : AttentionArgs<T> {
  T* out;      // [tokens, heads * head_dim]
  float* lse;  // [tokens, heads]
};

template <typename T>
struct AttentionGradArgs : AttentionArgs<T> {
  const T* d_out;                  // [tokens, heads * head_dim]
  const AttentionRowStats* stats;  // [heads, tokens]
  T* d_qkv;                        // [tokens, QkvWidth]

  __device__ const AttentionRowStats* Stats(const AttentionTile& tile,
                                            int head) const {
    return stats + head * this->tokens + tile.first;
  }
};

// The workspace: what both passes of the backward need, and the forward's tiles
// in the place of theirs. However tokens are cut into sequences, a tile has one
// at least.
struct AttentionWorkspace {
  static constexpr int64_t kAlign = 16;

  static int64_t Bytes(int64_t heads, int64_t tokens) {
    if (tokens == 0) return 0;
    return kAlign +
           tokens * (heads * static_cast<int64_t>(sizeof(AttentionRowStats)) +
                     2 * static_cast<int64_t>(sizeof(AttentionTile)));
  }
  AttentionWorkspace(const Tensor& tensor, int64_t heads, int64_t tokens) {
    GW_CHECK(!tensor.is_null() && tensor.bytes() >= Bytes(heads, tokens));
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.raw());
    char* begin =
        static_cast<char*>(tensor.raw()) + (kAlign - address % kAlign) % kAlign;
    stats = reinterpret_cast<AttentionRowStats*>(begin);
    query_tiles = reinterpret_cast<AttentionTile*>(stats + heads * tokens);
    key_tiles = query_tiles + tokens;
  }

  AttentionRowStats* stats;  // [heads, tokens]
  AttentionTile* query_tiles;
  AttentionTile* key_tiles;
};

// What a call of attention is made with, beside its tensors.
struct AttentionCall {
  const SequenceLayout& layout;
  const AttentionWorkspace& workspace;
  AttentionTileCache& cache;
  cudaStream_t stream;

  cudaError_t Tiles(int rows, AttentionWork work, TilesOnDevice& out) const {
    return cache.Get(layout, rows, work,
                     work == AttentionWork::kKeysBefore ? workspace.query_tiles
                                                        : workspace.key_tiles,
                     stream, out);
  }
};

// Of rows of a head, by 16 bytes: what the tensor cores' kernels ask for.
inline bool AttentionOnTensorCores(const AttentionShape& shape,
                                   std::initializer_list<const void*> tensors) {
  if (shape.head_dim % 8 != 0 || shape.head_dim > 256) return false;
  return std::all_of(tensors.begin(), tensors.end(), [](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
  });
}

// A block for each tile and head; blocks of one tile are neighbours.
inline dim3 GridOf(int64_t tiles, int64_t heads) {
  return dim3(static_cast<unsigned>(tiles * heads));
}

template <typename T>
AttentionArgs<T> ArgsOf(const Kernels::Attention& args) {
  return {args.qkv.data<T>(),
          nullptr,
          args.qkv.dim(0),
          static_cast<int>(args.shape.heads),
          static_cast<int>(args.shape.kv_heads),
          static_cast<int>(args.shape.head_dim),
          args.shape.scale};
}

inline void CheckAttention(const Kernels::Attention& args) {
  const AttentionShape& s = args.shape;
  GW_CHECK(s.kv_heads > 0 && s.heads % s.kv_heads == 0 && s.head_dim > 0);
  // The largest score is that of the largest q . k.
  GW_CHECK(s.scale > 0);
  GW_CHECK(args.qkv.dim(1) == s.QkvWidth());
  GW_CHECK(args.layout.num_sequences > 0 &&
           args.layout.cu_seqlens[args.layout.num_sequences] ==
               args.qkv.dim(0));
}

}  // namespace gradwire
