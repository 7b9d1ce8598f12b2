// SPDX-License-Identifier: Apache-2.0
// Operands of bf16_gemm.cc in the order in which its tiles read them: b by
// panels of columns, [k / 2][columns][2]; rows of a one behind the other.
#pragma once

#include "kernels/cpu/gemm.h"

#if defined(__x86_64__)
#include <algorithm>
#include <cstdint>
#include <cstring>

// GCC 12's own header has values that are undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#define GW_BF16_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define GW_BF16_INLINE GW_BF16_TARGET inline __attribute__((always_inline))

namespace gradwire {
namespace bf16 {

constexpr int64_t kLane = 16;  // columns of a vector

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline __mmask16 FirstLanes(int64_t n) {
  return static_cast<__mmask16>(n >= kLane ? 0xffff : (1u << n) - 1);
}

// Transposes 16 x 16 dwords: vector i becomes the i-th dwords of all.
GW_BF16_INLINE void Transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 g + j] holds, in its quarter q, column 4 q + j of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

// 16 pairs of k, from a run of up to 32 contiguous values; the rest is 0.
GW_BF16_INLINE __m512i LoadPairs(const BFloat16* from, int64_t n) {
  if (n >= 2 * kLane) return _mm512_loadu_si512(from);
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  return _mm512_maskz_loadu_epi16(mask, from);
}

// 16 pairs of k, one for each of the first n columns: rows `first` and `second`
// interleaved. A null second is 0.
GW_BF16_INLINE __m512i Interleave(const BFloat16* first, const BFloat16* second,
                                  __mmask16 mask) {
  const __m512i low =
      _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
  if (second == nullptr) return low;
  const __m512i high =
      _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Panels of `cols` columns, [pairs][vectors * 16] pairs, zeros beyond.

// Of a b whose columns are contiguous.
GW_BF16_TARGET inline void PackColumns(const GemmShape& shape,
                                       const BFloat16* b, int64_t cols,
                                       uint32_t* to) {
  const int64_t pairs = (shape.k + 1) / 2;
  const int64_t width = RoundUp(cols, kLane);
  for (int64_t v = 0; v < width; v += kLane) {
    const int64_t n = std::min(kLane, cols - v);
    const BFloat16* from = b + v * shape.b_col;
    for (int64_t p = 0; p < pairs; p += kLane) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        r[i] = i < n
                   ? LoadPairs(from + i * shape.b_col + 2 * p, shape.k - 2 * p)
                   : _mm512_setzero_si512();
      }
      Transpose(r);
      uint32_t* out = to + p * width + v;
      if (p + kLane <= pairs) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          _mm512_store_si512(out + i * width, r[i]);
        }
      } else {
        alignas(64) uint32_t room[16][16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(room[i], r[i]);
        for (int64_t i = 0; i < pairs - p; ++i) {
          std::memcpy(out + i * width, room[i], sizeof(room[i]));
        }
      }
    }
  }
}

// Of a b whose rows are contiguous: whole cache lines of two rows at a time.
GW_BF16_TARGET inline void PackPairsOfRows(const GemmShape& shape,
                                           const BFloat16* b, int64_t cols,
                                           uint32_t* to) {
  const int64_t pairs = (shape.k + 1) / 2;
  const int64_t width = RoundUp(cols, kLane);
  // Words i and 32 + i, from i = 0 and from i = 16 on.
  const __m512i count =
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first = _mm512_or_si512(
      count,
      _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(32)), 16));
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t p = 0; p < pairs; ++p, to += width) {
    const BFloat16* one = b + 2 * p * shape.b_row;
    const BFloat16* two = 2 * p + 1 < shape.k ? one + shape.b_row : nullptr;
    int64_t v = 0;
    for (; two != nullptr && v + 2 * kLane <= cols; v += 2 * kLane) {
      const __m512i x = _mm512_loadu_si512(one + v);
      const __m512i y = _mm512_loadu_si512(two + v);
      _mm512_store_si512(to + v, _mm512_permutex2var_epi16(x, first, y));
      _mm512_store_si512(to + v + kLane,
                         _mm512_permutex2var_epi16(x, second, y));
    }
    for (; v < cols; v += kLane) {
      _mm512_store_si512(to + v,
                         Interleave(one + v, two == nullptr ? nullptr : two + v,
                                    FirstLanes(std::min(kLane, cols - v))));
    }
  }
}

GW_BF16_TARGET inline void PackPanel(const GemmShape& shape, const BFloat16* b,
                                     int64_t cols, uint32_t* to) {
  if (shape.b_row == 1) {
    PackColumns(shape, b, cols, to);
  } else {
    PackPairsOfRows(shape, b, cols, to);
  }
}

// Sixteen rows, or the first `rows` of them, and sixteen pairs of k from pair p
// on.
GW_BF16_INLINE void PackBlock(const GemmShape& shape, const BFloat16* a,
                              int64_t rows, int64_t p, int64_t stride,
                              BFloat16* to) {
  const int64_t pairs = (shape.k + 1) / 2;
  const int64_t count = std::min(kLane, pairs - p);
  const __mmask16 mask = FirstLanes(rows);
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t k = 2 * (p + i);
    const BFloat16* from = a + k * shape.a_col;
    r[i] = i < count
               ? Interleave(
                     from, k + 1 < shape.k ? from + shape.a_col : nullptr, mask)
               : _mm512_setzero_si512();
  }
  Transpose(r);
  const __mmask16 stored = FirstLanes(count);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i < rows) {
      _mm512_mask_storeu_epi32(to + i * stride + 2 * p, stored, r[i]);
    }
  }
}

// Rows [0, n) of a transposed a, each [k] with a zero behind an odd k, `stride`
// values apart. Two blocks of rows at a time share the cache lines of a.
GW_BF16_TARGET inline void PackRows(const GemmShape& shape, const BFloat16* a,
                                    int64_t n, int64_t stride, BFloat16* to) {
  const int64_t pairs = (shape.k + 1) / 2;
  for (int64_t two = 0; two < n; two += 2 * kLane) {
    for (int64_t p = 0; p < pairs; p += kLane) {
      for (int64_t row = two; row < std::min(n, two + 2 * kLane);
           row += kLane) {
        PackBlock(shape, a + row, std::min(kLane, n - row), p, stride,
                  to + row * stride);
      }
    }
  }
}

// A row-major a of odd k: its rows with a zero behind.
inline void CopyRows(const GemmShape& shape, const BFloat16* a, int64_t n,
                     int64_t stride, BFloat16* to) {
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(a + i * shape.a_row, shape.k, to + i * stride);
    to[i * stride + shape.k] = BFloat16(0.0f);
  }
}

// Brings a panel into the second-level cache bit by bit, while the tiles of the
// one before it are computed.
class PanelPrefetch {
 public:
  // In about `calls` calls of Next.
  PanelPrefetch(const GemmShape& shape, const BFloat16* b, int64_t cols,
                int64_t calls)
      : from_(reinterpret_cast<const char*>(b)) {
    const bool by_columns = shape.b_row == 1;
    stride_ = 2 * (by_columns ? shape.b_col : shape.b_row);  // in bytes
    runs_ = by_columns ? cols : shape.k;
    bytes_ = 2 * (by_columns ? shape.k : cols);
    step_ = (runs_ + calls - 1) / calls;
  }

  void Next() {
    const int64_t end = std::min(runs_, run_ + step_);
    for (; run_ < end; ++run_) {
      for (int64_t at = 0; at < bytes_; at += 64) {
        __builtin_prefetch(from_ + run_ * stride_ + at, 0, 2);
      }
    }
  }

 private:
  const char* const from_;
  int64_t runs_, bytes_, stride_, step_, run_ = 0;
};

}  // namespace bf16
}  // namespace gradwire

#endif
