// SPDX-License-Identifier: Apache-2.0
// Rows of the table, copied and summed.
#include <algorithm>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/squares.h"
#include "kernels/squares.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/embedding.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;

template <class T>
void AddColumns(const Tensor& tokens, const Tensor& d_out, int64_t begin,
                int64_t end, const Tensor& d_table) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t hidden = d_out.dim(1);
  const int32_t* ids = tokens.data<int32_t>();
  for (int64_t t = 0; t < tokens.dim(0); ++t) {
    const T* from = d_out.data<T>() + t * hidden;
    float* to = d_table.data<float>() + ids[t] * hidden;
    for (int64_t i = begin; i < end; i += lanes) {
      const int64_t n = end - i;
      const auto sum =
          hn::Add(LoadFirst(d, to + i, n), LoadFirst(d, from + i, n));
      StoreFirst(d, sum, n, to + i);
    }
  }
}

void Backward(const Tensor& tokens, const Tensor& d_out, int64_t begin,
              int64_t end, const Tensor& d_table) {
  if (d_out.dtype() == DType::kBF16) {
    return AddColumns<BFloat16>(tokens, d_out, begin, end, d_table);
  }
  AddColumns<float>(tokens, d_out, begin, end, d_table);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(Backward);

// Rows a thread takes at least; fewer are not worth waking one.
constexpr int64_t kRowsOfSquares = 64;

}  // namespace

void CpuKernels::EmbeddingForward(Stream& stream, const Tensor& tokens,
                                  const Tensor& table, const Tensor& out) {
  // The table's rows named by `tokens` are what GatherRows gathers.
  GatherRows(stream, table, tokens, out);
}

// Threads share the columns, so that no two write one element and each row's
// terms come in the order of the tokens.
void CpuKernels::EmbeddingBackward(Stream& stream, const Tensor& tokens,
                                   const Tensor& d_out, const Tensor& d_table,
                                   const Tensor& squares) {
  if (!stream.ok()) return;
  const int64_t hidden = d_out.dim(1);
  GW_CHECK(d_out.dim(0) == tokens.dim(0) && d_table.dim(1) == hidden);
  constexpr int64_t kCacheLine = 16;
  Pool(stream).ParallelFor(hidden, kCacheLine, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(Backward)(tokens, d_out, begin, end, d_table);
  });
  if (squares.is_null()) return;
  const int64_t blocks = SquareBlocks(hidden);
  GW_CHECK(squares.dim(0) == d_table.dim(0) && squares.dim(1) == blocks);
  std::vector<int32_t> ids(tokens.data<int32_t>(),
                           tokens.data<int32_t>() + tokens.dim(0));
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  Pool(stream).ParallelFor(
      static_cast<int64_t>(ids.size()), kRowsOfSquares,
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t id = ids[static_cast<size_t>(i)];
          SquaresOfRows(d_table.data<float>() + id * hidden, 1, hidden, hidden,
                        squares.data<double>() + id * blocks, blocks);
        }
      });
}

}  // namespace gradwire
#endif
