// SPDX-License-Identifier: Apache-2.0
// Bound by the multipliers: one vdpbf16ps a cycle, each 16 columns by two k.
//
// Six rows by four vectors of columns leave 24 sums in registers, four vectors
// of b and one broadcast pair of a; a step of two k is 24 products for ten
// loads. b lies in a packed panel, pair by pair: [k / 2][columns][2]. a is read
// where it lies if its rows are contiguous; columns of a transposed a are
// packed into rows first.
#include "kernels/cpu/bf16_gemm.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "kernels/cpu/bf16_pack.h"
#include "kernels/cpu/simd.h"
#include "kernels/squares.h"

#if defined(__x86_64__)

namespace gradwire {
namespace {

constexpr int kRows = 6;     // of a at a time
constexpr int kVectors = 4;  // of columns at a time
// A panel of more k than this has half the columns, to stay in the cache.
constexpr int64_t kDeep = 5120;
// Rows of a that are packed at a time.
constexpr int64_t kPackedRows = 768;
// Of a panel of at most this k the next one is brought into the cache early.
constexpr int64_t kPrefetched = 2048;
// A c of at least as many values is written past the caches.
constexpr int64_t kStreamed = 1 << 18;
// Room between packed rows, so that they do not fall on the same cache sets.
constexpr int64_t kRowGap = 32;

using bf16::CopyRows;
using bf16::FirstLanes;
using bf16::kLane;
using bf16::PackPanel;
using bf16::PackRows;
using bf16::PanelPrefetch;
using bf16::RoundUp;

// What becomes of a tile of sums.
struct Output {
  void* c = nullptr;  // the tile's first element
  int64_t row;
  DType dtype;
  bool accumulate;
  bool stream;     // past the caches; c's vectors are aligned then
  __mmask16 last;  // columns of the tile's last vector
  // Where the squares of the tile's rows go, or null; the first tile of each
  // sum writes it, the others add.
  double* squares = nullptr;
  int64_t squares_row;
  bool begins_squares;
};

// Returns what is stored, before it is rounded to bf16; 0 beyond the mask.
GW_BF16_INLINE __m512 StoreVector(const Output& out, __m512 sum, int64_t at,
                                  __mmask16 mask) {
  if (out.dtype == DType::kF32) {
    float* c = static_cast<float*>(out.c) + at;
    if (out.accumulate) {
      sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), sum);
    }
    if (out.stream && mask == 0xffff) {
      _mm512_stream_ps(c, sum);
      return sum;
    }
    _mm512_mask_storeu_ps(c, mask, sum);
    return sum;
  }
  BFloat16* c = static_cast<BFloat16*>(out.c) + at;
  if (out.accumulate) {
    const __m512i old = _mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, c)), 16);
    sum = _mm512_add_ps(_mm512_castsi512_ps(old), sum);
  }
  _mm256_mask_storeu_epi16(c, mask,
                           reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  return sum;
}

// The squares of eight sums, added to `squares`.
GW_BF16_INLINE __m512d AddSquares(__m256 x, __m512d squares) {
  const __m512d wide = _mm512_cvtps_pd(x);
  return _mm512_fmadd_pd(wide, wide, squares);
}

// Rows x Vectors * 16 sums over `pairs` pairs. `b_row`: from one pair of k to
// the next in b.
template <int Rows, int Vectors>
GW_BF16_TARGET void Tile(const BFloat16* a, int64_t a_row, const uint32_t* b,
                         int64_t b_row, int64_t pairs, const Output& out) {
  __m512 sums[Rows][Vectors];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    // c is there when the sums are.
    const char* c =
        static_cast<const char*>(out.c) + r * out.row * DTypeBytes(out.dtype);
    for (int64_t at = 0;
         !out.stream && at < Vectors * kLane * DTypeBytes(out.dtype);
         at += 64) {
      __builtin_prefetch(c + at, 1);
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p, b += b_row) {
    __m512i columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      columns[v] = _mm512_load_si512(b + v * kLane);
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      int pair;
      std::memcpy(&pair, a + r * a_row + 2 * p, sizeof(pair));
      const __m512i row = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        sums[r][v] =
            _mm512_dpbf16_ps(sums[r][v], reinterpret_cast<__m512bh>(row),
                             reinterpret_cast<__m512bh>(columns[v]));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = StoreVector(
          out, sums[r][v], r * out.row + v * kLane,
          v + 1 == Vectors ? out.last : static_cast<__mmask16>(0xffff));
    }
  }
  if (out.squares == nullptr) return;
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      low = AddSquares(_mm512_castps512_ps256(sums[r][v]), low);
      high = AddSquares(_mm512_extractf32x8_ps(sums[r][v], 1), high);
    }
    const double total = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    double& to = out.squares[r * out.squares_row];
    to = out.begins_squares ? total : to + total;
  }
}

using TileFunction = void (*)(const BFloat16*, int64_t, const uint32_t*,
                              int64_t, int64_t, const Output&);

// By rows - 1 and vectors - 1.
template <int... I>
constexpr std::array<TileFunction, sizeof...(I)> TileTable(
    std::integer_sequence<int, I...>) {
  return {Tile<I / kVectors + 1, I % kVectors + 1>...};
}
constexpr auto kTiles =
    TileTable(std::make_integer_sequence<int, kRows * kVectors>());

bool PacksRows(const GemmShape& shape) {
  return shape.a_col != 1 || shape.k % 2 != 0;
}

int64_t PackedStride(const GemmShape& shape) {
  return RoundUp(shape.k, 2 * kLane) + kRowGap;
}

int64_t PanelColumns(const GemmShape& shape) {
  return (shape.k > kDeep ? kVectors / 2 : kVectors) * kLane;
}

// Whether c goes past the caches: a gradient, which has sums of squares, that
// is written only, by whole cache lines, and too large to be there still when
// it is read.
bool Streams(const GemmShape& shape, const void* c, const double* squares) {
  return squares != nullptr && shape.c == DType::kF32 && !shape.accumulate &&
         shape.c_row % kLane == 0 &&
         reinterpret_cast<uintptr_t>(c) % (4 * kLane) == 0 &&
         shape.m * shape.n >= kStreamed;
}

// What of a tile has to be computed.
struct Extent {
  int64_t first_pair, end_pair;  // of k
  int64_t vectors;               // of columns, from the first on
};

// Of the tile of rows [row, row + rows) and columns from `col` on; `whole` is
// all of it.
Extent Visible(const CausalSkip& skip, int64_t row, int64_t rows, int64_t col,
               Extent whole) {
  // The keys that the tile's last query row sees.
  const int64_t keys =
      std::max<int64_t>(0, skip.visible + (row + rows - 1) / skip.group);
  switch (skip.of) {
    case CausalSkip::Of::kResult:
      whole.vectors = std::clamp<int64_t>((keys - col + kLane - 1) / kLane, 0,
                                          whole.vectors);
      break;
    case CausalSkip::Of::kLeft:
      whole.end_pair = std::min((keys + 1) / 2, whole.end_pair);
      break;
    case CausalSkip::Of::kLeftTransposed:
      // From the first query row on that sees the tile's first key.
      whole.first_pair = std::clamp<int64_t>(
          (row + 1 - skip.visible) * skip.group / 2, 0, whole.end_pair);
      break;
  }
  return whole;
}

// Columns [i, i + 1) of `n` panels of about as many vectors each.
int64_t PanelStart(int64_t cols, int64_t i, int64_t n) {
  return std::min(cols, (cols + kLane - 1) / kLane * i / n * kLane);
}

// Cuts [0, size) at multiples of `grain`.
int64_t Cut(int64_t size, int64_t grain, int64_t i, int64_t n) {
  return std::min(size, (size + grain - 1) / grain * i / n * grain);
}

}  // namespace

bool HasBf16Dot() { return kHasBf16Convert; }

GemmPart Bf16GemmPart(const GemmShape& shape, bool squares, int threads,
                      int thread) {
  const int64_t col_grain = squares ? kSquareBlock : kLane;
  // In cycles for each k: a vector of products a cycle; packing takes a quarter
  // for each value.
  const auto cost = [&](int64_t row_cuts) {
    const int64_t col_cuts = threads / row_cuts;
    const double rows = static_cast<double>(
        RoundUp((shape.m + row_cuts - 1) / row_cuts, kRows));
    const double cols = static_cast<double>(
        std::min(RoundUp(shape.n, kLane),
                 RoundUp((shape.n + col_cuts - 1) / col_cuts, col_grain)));
    const double passes =
        PacksRows(shape) ? std::max(1.0, rows / kPackedRows) : 1.0;
    return rows * cols / (2 * kLane) + 0.25 * cols * passes +
           (PacksRows(shape) ? 0.25 * rows : 0.0);
  };
  int64_t best = 1;
  for (int64_t row_cuts = 2; row_cuts <= threads; ++row_cuts) {
    if (threads % row_cuts == 0 && cost(row_cuts) < cost(best)) best = row_cuts;
  }
  const int64_t col_cuts = threads / best;
  const int64_t r = thread / col_cuts, q = thread % col_cuts;
  return {Cut(shape.m, kRows, r, best), Cut(shape.m, kRows, r + 1, best),
          Cut(shape.n, col_grain, q, col_cuts),
          Cut(shape.n, col_grain, q + 1, col_cuts)};
}

int64_t Bf16GemmScratchBytes(const GemmShape& shape, const GemmPart& part) {
  const int64_t panel = RoundUp(shape.k, 2) * PanelColumns(shape) * 2;
  const int64_t rows =
      PacksRows(shape)
          ? std::min(kPackedRows, part.row_end - part.row) * PackedStride(shape)
          : 0;
  return panel + rows * 2;
}

void Bf16GemmRun(const GemmShape& shape, const GemmPart& part,
                 const BFloat16* a, const BFloat16* b, void* c, double* squares,
                 char* scratch, const CausalSkip* skip) {
  GW_CHECK(skip == nullptr || squares == nullptr);
  GW_CHECK((shape.a_col == 1 || shape.a_row == 1) &&
           (shape.b_row == 1 || shape.b_col == 1));
  const int64_t cols = part.col_end - part.col;
  if (cols <= 0 || part.row_end <= part.row) return;
  const int64_t pairs = (shape.k + 1) / 2;
  const int64_t panels = (cols + PanelColumns(shape) - 1) / PanelColumns(shape);
  const bool packs = PacksRows(shape);
  const int64_t row_step = packs ? kPackedRows : part.row_end - part.row;
  uint32_t* panel = reinterpret_cast<uint32_t*>(scratch);
  BFloat16* packed = reinterpret_cast<BFloat16*>(
      scratch + RoundUp(shape.k, 2) * PanelColumns(shape) * 2);
  // Sums of squares are made panel by panel, so these lie where they lie for
  // any number of threads.
  const auto start = [&](int64_t i) {
    return squares == nullptr ? PanelStart(cols, i, panels)
                              : std::min(cols, i * PanelColumns(shape));
  };
  const int64_t blocks = SquareBlocks(shape.n);
  const bool stream = Streams(shape, c, squares);
  for (int64_t first = part.row; first < part.row_end; first += row_step) {
    const int64_t rows = std::min(row_step, part.row_end - first);
    const BFloat16* from = a + first * shape.a_row;
    int64_t a_row = shape.a_row;
    if (packs) {
      a_row = PackedStride(shape);
      if (shape.a_col == 1) {
        CopyRows(shape, from, rows, a_row, packed);
      } else {
        PackRows(shape, from, rows, a_row, packed);
      }
      from = packed;
    }
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t col = part.col + start(i), end = part.col + start(i + 1);
      PackPanel(shape, b + col * shape.b_col, end - col, panel);
      const int64_t vectors = (end - col + kLane - 1) / kLane;
      const __mmask16 last = FirstLanes(end - col - (vectors - 1) * kLane);
      Output out = {.row = shape.c_row,
                    .dtype = shape.c,
                    .accumulate = shape.accumulate,
                    .stream = stream,
                    .last = last,
                    .squares_row = blocks,
                    .begins_squares = col % kSquareBlock == 0};
      const bool more = i + 1 < panels && shape.k <= kPrefetched;
      PanelPrefetch next(shape, b + (part.col + start(i + 1)) * shape.b_col,
                         more ? part.col + start(i + 2) - end : 0,
                         (rows + kRows - 1) / kRows);
      for (int64_t r = 0; r < rows; r += kRows) {
        if (more) next.Next();
        const int64_t n = std::min<int64_t>(kRows, rows - r);
        out.c = static_cast<char*>(c) +
                ((first + r) * shape.c_row + col) * DTypeBytes(shape.c);
        if (squares != nullptr) {
          out.squares = squares + (first + r) * blocks + col / kSquareBlock;
        }
        Extent part_of = {0, pairs, vectors};
        if (skip != nullptr) {
          part_of = Visible(*skip, first + r, n, col, part_of);
          if (part_of.vectors == 0) continue;
          out.last = part_of.vectors == vectors
                         ? last
                         : static_cast<__mmask16>(0xffff);
        }
        kTiles[static_cast<size_t>((n - 1) * kVectors + part_of.vectors - 1)](
            from + r * a_row + 2 * part_of.first_pair, a_row,
            panel + part_of.first_pair * vectors * kLane, vectors * kLane,
            part_of.end_pair - part_of.first_pair, out);
      }
    }
  }
  // Before other threads are told that the part is there.
  if (stream) _mm_sfence();
}

}  // namespace gradwire

#else  // not x86-64

namespace gradwire {

bool HasBf16Dot() { return false; }
GemmPart Bf16GemmPart(const GemmShape&, bool, int, int) { return {}; }
int64_t Bf16GemmScratchBytes(const GemmShape&, const GemmPart&) { return 0; }
void Bf16GemmRun(const GemmShape&, const GemmPart&, const BFloat16*,
                 const BFloat16*, void*, double*, char*, const CausalSkip*) {
  GW_CHECK(false);
}

}  // namespace gradwire

#endif
