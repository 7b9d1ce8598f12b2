// SPDX-License-Identifier: Apache-2.0
// Bound by memory, or by the cache that x still lies in.
#include "kernels/squares.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/squares.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/squares.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Sixteen running sums, whatever the vector's width, so that every machine adds
// in the same order.
constexpr int64_t kSums = 16;

double SquareSum(const float* x, int64_t n) {
  const hn::CappedTag<double, kSums> d;
  const hn::Rebind<float, decltype(d)> df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  HWY_ALIGN double sums[kSums] = {};
  const int64_t whole = n / kSums * kSums;
  for (int64_t i = 0; i < whole; i += kSums) {
    for (int64_t j = 0; j < kSums; j += lanes) {
      const auto v = hn::PromoteTo(d, hn::LoadU(df, x + i + j));
      hn::Store(hn::MulAdd(v, v, hn::Load(d, sums + j)), d, sums + j);
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    sums[i - whole] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  return std::accumulate(sums, sums + kSums, 0.0);
}

void SquaresOfRows(const float* x, int64_t rows, int64_t cols, int64_t stride,
                   double* squares, int64_t squares_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < SquareBlocks(cols); ++b) {
      const int64_t first = b * kSquareBlock;
      squares[r * squares_stride + b] = SquareSum(
          x + r * stride + first, std::min(kSquareBlock, cols - first));
    }
  }
}

double Sum(const double* x, int64_t n) {
  const hn::CappedTag<double, kSums> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  HWY_ALIGN double sums[kSums] = {};
  const int64_t whole = n / kSums * kSums;
  for (int64_t i = 0; i < whole; i += kSums) {
    for (int64_t j = 0; j < kSums; j += lanes) {
      hn::Store(hn::Add(hn::LoadU(d, x + i + j), hn::Load(d, sums + j)), d,
                sums + j);
    }
  }
  for (int64_t i = whole; i < n; ++i) sums[i - whole] += x[i];
  return std::accumulate(sums, sums + kSums, 0.0);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(SquaresOfRows);
HWY_EXPORT(Sum);

// Elements of one partial sum.
constexpr int64_t kBlock = 1 << 14;
// Elements a thread takes at least; less is not worth waking one.
constexpr int64_t kGrain = 1 << 14;

}  // namespace

void SquaresOfRows(const float* x, int64_t rows, int64_t cols, int64_t stride,
                   double* squares, int64_t squares_stride) {
  HWY_DYNAMIC_DISPATCH(SquaresOfRows)
  (x, rows, cols, stride, squares, squares_stride);
}

void CpuKernels::RowSquares(Stream& stream, const Tensor& x,
                            const Tensor& squares) {
  if (!stream.ok() || x.num_elements() == 0) return;
  const int64_t cols = x.dim(1), blocks = SquareBlocks(cols);
  GW_CHECK(squares.dim(0) == x.dim(0) && squares.dim(1) == blocks);
  Pool(stream).ParallelFor(
      x.dim(0), std::max<int64_t>(1, kGrain / cols),
      [&](int64_t begin, int64_t end) {
        gradwire::SquaresOfRows(
            x.data<float>() + begin * cols, end - begin, cols, cols,
            squares.data<double>() + begin * blocks, blocks);
      });
}

double CpuKernels::Sum(Stream& stream, const Tensor& x) {
  if (!stream.ok()) return 0;
  const int64_t n = x.num_elements();
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums(static_cast<size_t>(blocks), 0.0);
  Pool(stream).ParallelFor(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      sums[static_cast<size_t>(b)] = HWY_DYNAMIC_DISPATCH(Sum)(
          x.data<double>() + b * kBlock, std::min(kBlock, n - b * kBlock));
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace gradwire
#endif
