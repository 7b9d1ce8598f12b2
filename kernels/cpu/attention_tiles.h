// SPDX-License-Identifier: Apache-2.0
// How attention is cut into tiles, and how tiles are packed.
//
// Work on one sequence and one key-value head goes by blocks of queries (rows:
// token by head of the group) against blocks of keys. Queries are packed dense.
// Our own products read keys where they lie and take any number of them; for a
// library's, which are made for a shape, keys are packed too, and both padded
// with zero rows to multiples of 16 queries and 64 keys, so that few shapes
// exist whatever the lengths of the sequences are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/softmax_tile.h"
#include "kernels/kernels.h"

namespace gradwire {

struct AttentionTiles {
  // Rows of a query block that keep a tile of scores in the second-level cache
  // and a product long enough to run at full speed.
  static constexpr int64_t kRows = 192;
  static constexpr int64_t kMaxTokens = 128;
  static constexpr int64_t kKeys = 256;

  // `own`: whether the products of `dtype` are our own.
  AttentionTiles(const AttentionShape& s, DType dtype, bool own)
      : shape(s),
        act(dtype),
        own_products(own),
        group(s.heads / s.kv_heads),
        query_tokens(std::clamp<int64_t>(
            kRows / group / kTileLanes * kTileLanes, kTileLanes, kMaxTokens)) {}

  // Tokens of queries, and columns of a tile of scores.
  int64_t PadQueries(int64_t n) const {
    return own_products ? n : RoundUp(n, kTileLanes);
  }
  int64_t PadKeys(int64_t n) const {
    return RoundUp(n, own_products ? kTileLanes : 4 * kTileLanes);
  }

  int64_t rows() const { return query_tokens * group; }
  int64_t act_bytes() const { return DTypeBytes(act); }
  // Row widths, in elements.
  int64_t qkv_width() const { return shape.QkvWidth(); }
  int64_t out_width() const { return shape.heads * shape.head_dim; }
  // Offsets of a key-value head's parts within a row of qkv, in elements.
  int64_t q_offset(int64_t kv_head) const {
    return kv_head * group * shape.head_dim;
  }
  int64_t k_offset(int64_t kv_head) const {
    return (shape.heads + kv_head) * shape.head_dim;
  }
  int64_t v_offset(int64_t kv_head) const {
    return (shape.heads + shape.kv_heads + kv_head) * shape.head_dim;
  }

  // Copies `n` rows of `cols` elements that lie `stride` elements apart, from
  // element `offset` of `base` on, and adds zero rows up to `padded`.
  struct Rows {
    int64_t n, padded, cols, stride;
  };
  void Pack(const void* base, int64_t offset, const Rows& rows,
            void* to) const {
    const char* from = static_cast<const char*>(base) + offset * act_bytes();
    char* out = static_cast<char*>(to);
    const size_t bytes = static_cast<size_t>(rows.cols * act_bytes());
    for (int64_t i = 0; i < rows.n; ++i) {
      std::memcpy(out, from, bytes);
      from += rows.stride * act_bytes();
      out += bytes;
    }
    std::memset(out, 0, static_cast<size_t>(rows.padded - rows.n) * bytes);
  }

  // `n` keys and values as products take them: row i is at element i * row.
  struct Keys {
    const void *k, *v;
    int64_t n, row;
  };
  // Of token `first` on. The rooms hold PadKeys(n) rows of head_dim.
  Keys KeysAt(const void* qkv, int64_t first, int64_t kv_head, int64_t n,
              void* k_room, void* v_room) const {
    const int64_t k = first * qkv_width() + k_offset(kv_head);
    const int64_t v = first * qkv_width() + v_offset(kv_head);
    if (own_products) {
      const char* base = static_cast<const char*>(qkv);
      return {base + k * act_bytes(), base + v * act_bytes(), n, qkv_width()};
    }
    const Rows rows = {n, PadKeys(n), shape.head_dim, qkv_width()};
    Pack(qkv, k, rows, k_room);
    Pack(qkv, v, rows, v_room);
    return {k_room, v_room, rows.padded, shape.head_dim};
  }

  const AttentionShape shape;
  const DType act;
  const bool own_products;
  const int64_t group;
  const int64_t query_tokens;

 private:
  static int64_t RoundUp(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
  }
};

}  // namespace gradwire
