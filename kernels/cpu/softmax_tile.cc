// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/softmax_tile.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/softmax_tile.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, kTileLanes>;
using V = hn::Vec<D>;

constexpr float kLog2E = 1.44269504f;

// Elements that fill no whole vector go one by one.
template <class T>
void ScaleRow(const float* from, int64_t n, float factor, T* to) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V f = hn::Set(d, factor);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    StoreF32(d, hn::Mul(hn::LoadU(d, from + i), f), to + i);
  }
  for (; i < n; ++i) to[i] = T(from[i] * factor);
}

template <class T>
void ForwardRow(const SoftmaxForwardTile& tile, int64_t row, int64_t visible,
                T* probs) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t cols = tile.shape.cols;
  const float* scores = tile.scores + row * cols;
  const int64_t whole = visible / lanes * lanes;
  const auto rest =
      hn::FirstN(d, static_cast<size_t>(std::max<int64_t>(0, visible - whole)));
  const V lowest = hn::Set(d, -INFINITY);
  float max = tile.max[row];
  if (visible > 0) {
    V m = lowest;
    for (int64_t c = 0; c < whole; c += lanes) {
      m = hn::Max(m, hn::Load(d, scores + c));
    }
    if (whole < visible) {
      m = hn::Max(m, hn::IfThenElse(rest, hn::Load(d, scores + whole), lowest));
    }
    const float top = hn::GetLane(hn::MaxOfLanes(d, m)) * tile.shape.scale;
    if (top > max) {
      const float factor = std::exp(max - top);
      if (tile.sum[row] > 0) {
        tile.sum[row] *= factor;
        float* out = tile.out + row * tile.head_dim;
        ScaleRow(out, tile.head_dim, factor, out);
      }
      tile.max[row] = max = top;
    }
  }
  const V scale = hn::Set(d, tile.shape.scale * kLog2E);
  const V minus_max = hn::Set(d, -max * kLog2E);
  V sum = hn::Zero(d);
  int64_t c = 0;
  for (; c < whole; c += lanes) {
    const V x = hn::MulAdd(hn::Load(d, scores + c), scale, minus_max);
    const V p = SoftmaxExp2(d, x);
    sum = hn::Add(sum, p);
    StoreF32(d, p, probs + c);
  }
  if (whole < visible) {
    const V x = hn::MulAdd(hn::Load(d, scores + c), scale, minus_max);
    const V p = hn::IfThenElseZero(rest, SoftmaxExp2(d, x));
    sum = hn::Add(sum, p);
    StoreF32(d, p, probs + c);
    c += lanes;
  }
  for (; c < cols; c += lanes) StoreF32(d, hn::Zero(d), probs + c);
  tile.sum[row] += hn::GetLane(hn::SumOfLanes(d, sum));
}

template <class T>
void ForwardRows(const SoftmaxForwardTile& tile, T* probs) {
  const TileShape& s = tile.shape;
  for (int64_t i = 0; i < s.tokens; ++i) {
    const int64_t visible = std::clamp<int64_t>(s.visible + i, 0, s.cols);
    for (int64_t row = i * s.group; row < (i + 1) * s.group; ++row) {
      ForwardRow(tile, row, visible, probs + row * s.cols);
    }
  }
}

void ForwardImpl(const SoftmaxForwardTile& tile) {
  if (tile.probs != nullptr) {
    ForwardRows(tile, tile.probs);
  } else {
    ForwardRows(tile, tile.scores);
  }
}

template <class T>
void BackwardRows(const SoftmaxBackwardTile& tile, T* probs, T* d_scores) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const TileShape& s = tile.shape;
  const V scale = hn::Set(d, s.scale);
  const V scale2 = hn::Set(d, s.scale * kLog2E);
  for (int64_t row = 0; row < s.tokens * s.group; ++row) {
    const int64_t visible =
        std::clamp<int64_t>(s.visible + row / s.group, 0, s.cols);
    const int64_t at = row * s.cols;
    const V minus_lse = hn::Set(d, -tile.lse[row] * kLog2E);
    const V delta = hn::Set(d, tile.delta[row]);
    int64_t c = 0;
    for (; c < visible; c += lanes) {
      const V x =
          hn::MulAdd(hn::Load(d, tile.scores + at + c), scale2, minus_lse);
      V p = SoftmaxExp2(d, x);
      const V d_p = hn::Load(d, tile.d_probs + at + c);
      V d_s = hn::Mul(hn::Mul(p, scale), hn::Sub(d_p, delta));
      if (c + lanes > visible) {
        const auto seen = hn::FirstN(d, static_cast<size_t>(visible - c));
        p = hn::IfThenElseZero(seen, p);
        d_s = hn::IfThenElseZero(seen, d_s);
      }
      StoreF32(d, p, probs + at + c);
      StoreF32(d, d_s, d_scores + at + c);
    }
    for (; c < s.cols; c += lanes) {
      StoreF32(d, hn::Zero(d), probs + at + c);
      StoreF32(d, hn::Zero(d), d_scores + at + c);
    }
  }
}

void BackwardImpl(const SoftmaxBackwardTile& tile) {
  if (tile.probs != nullptr) {
    BackwardRows(tile, tile.probs, tile.d_scores);
  } else {
    BackwardRows(tile, tile.scores, tile.d_probs);
  }
}

template <class T>
void DotRows(const T* a, const T* b, int64_t rows, int64_t cols, float* dots) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t r = 0; r < rows; ++r, a += cols, b += cols) {
    V sum = hn::Zero(d);
    int64_t c = 0;
    for (; c + lanes <= cols; c += lanes) {
      sum = hn::MulAdd(LoadF32(d, a + c), LoadF32(d, b + c), sum);
    }
    float dot = hn::GetLane(hn::SumOfLanes(d, sum));
    for (; c < cols; ++c) {
      dot += static_cast<float>(a[c]) * static_cast<float>(b[c]);
    }
    dots[r] = dot;
  }
}

void RowDotsImpl(DType act, const void* a, const void* b, int64_t rows,
                 int64_t cols, float* dots) {
  if (act == DType::kBF16) {
    DotRows(static_cast<const BFloat16*>(a), static_cast<const BFloat16*>(b),
            rows, cols, dots);
  } else {
    DotRows(static_cast<const float*>(a), static_cast<const float*>(b), rows,
            cols, dots);
  }
}

template <class T>
void StoreAll(const RowsToStore& x, T* to) {
  const int64_t run = x.divisors == nullptr ? x.cols : x.run;
  const float* divisor = x.divisors;
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t c = 0; c < x.cols; c += run) {
      const float factor = divisor == nullptr ? 1.0f : 1.0f / *divisor++;
      ScaleRow(x.from + r * x.from_row + c, run, factor, to + r * x.to_row + c);
    }
  }
}

void StoreRowsImpl(DType act, const RowsToStore& x) {
  if (act == DType::kBF16) {
    StoreAll(x, static_cast<BFloat16*>(x.to));
  } else {
    StoreAll(x, static_cast<float*>(x.to));
  }
}

void AddRowsImpl(const float* from, int64_t rows, int64_t cols, float* to,
                 int64_t to_row) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t r = 0; r < rows; ++r, from += cols, to += to_row) {
    int64_t c = 0;
    for (; c + lanes <= cols; c += lanes) {
      hn::StoreU(hn::Add(hn::LoadU(d, to + c), hn::LoadU(d, from + c)), d,
                 to + c);
    }
    for (; c < cols; ++c) to[c] += from[c];
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {

HWY_EXPORT(ForwardImpl);
HWY_EXPORT(BackwardImpl);
HWY_EXPORT(RowDotsImpl);
HWY_EXPORT(StoreRowsImpl);
HWY_EXPORT(AddRowsImpl);

void SoftmaxForward(const SoftmaxForwardTile& tile) {
  HWY_DYNAMIC_DISPATCH(ForwardImpl)(tile);
}

void SoftmaxBackward(const SoftmaxBackwardTile& tile) {
  HWY_DYNAMIC_DISPATCH(BackwardImpl)(tile);
}

void RowDots(DType act, const void* a, const void* b, int64_t rows,
             int64_t cols, float* dots) {
  HWY_DYNAMIC_DISPATCH(RowDotsImpl)(act, a, b, rows, cols, dots);
}

void StoreRows(DType act, const RowsToStore& rows) {
  HWY_DYNAMIC_DISPATCH(StoreRowsImpl)(act, rows);
}

void AddRows(const float* from, int64_t rows, int64_t cols, float* to,
             int64_t to_row) {
  HWY_DYNAMIC_DISPATCH(AddRowsImpl)(from, rows, cols, to, to_row);
}

}  // namespace gradwire
#endif
