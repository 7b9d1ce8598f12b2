// SPDX-License-Identifier: Apache-2.0
// Copies and sums of rows, and casts.
#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu_kernels_impl.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/softmax_tile.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rows.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace {

using D = hn::CappedTag<float, 16>;

template <class T>
void AddInto(const T* x, int64_t n, T* y) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += lanes) {
    const auto sum =
        hn::Add(LoadFirst(d, y + i, n - i), LoadFirst(d, x + i, n - i));
    StoreFirst(d, sum, n - i, y + i);
  }
}

void AddF32(const float* x, int64_t n, float* y) { AddInto(x, n, y); }
// y += x in float32.
void AddWide(const BFloat16* x, int64_t n, float* y) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += lanes) {
    StoreFirst(d,
               hn::Add(LoadFirst(d, y + i, n - i), LoadFirst(d, x + i, n - i)),
               n - i, y + i);
  }
}
void AddBF16(const BFloat16* x, int64_t n, BFloat16* y) { AddInto(x, n, y); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gradwire {
namespace {

HWY_EXPORT(AddF32);
HWY_EXPORT(AddWide);
HWY_EXPORT(AddBF16);

// Elements a thread takes at least; less is not worth waking one.
constexpr int64_t kGrain = 4096;

char* RowAt(const Tensor& t, int64_t row) {
  return static_cast<char*>(t.raw()) + row * t.dim(1) * DTypeBytes(t.dtype());
}

}  // namespace

void CpuKernels::GatherRows(Stream& stream, const Tensor& x, const Tensor& rows,
                            const Tensor& out) {
  if (!stream.ok() || out.bytes() == 0) return;
  GW_CHECK(x.dtype() == out.dtype() && x.dim(1) == out.dim(1));
  const size_t bytes = static_cast<size_t>(x.dim(1) * DTypeBytes(x.dtype()));
  const int32_t* from = rows.data<int32_t>();
  Pool(stream).ParallelFor(rows.dim(0), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(RowAt(out, i), RowAt(x, from[i]), bytes);
    }
  });
}

void CpuKernels::ScatterRows(Stream& stream, const Tensor& x,
                             const Tensor& rows, const Tensor& out) {
  if (!stream.ok() || out.bytes() == 0) return;
  GW_CHECK(x.dtype() == out.dtype() && x.dim(1) == out.dim(1));
  const size_t bytes = static_cast<size_t>(x.dim(1) * DTypeBytes(x.dtype()));
  ThreadPool& pool = Pool(stream);
  pool.ParallelFor(out.dim(0), 8, [&](int64_t begin, int64_t end) {
    std::memset(RowAt(out, begin), 0, bytes * static_cast<size_t>(end - begin));
  });
  const int32_t* to = rows.data<int32_t>();
  pool.ParallelFor(rows.dim(0), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(RowAt(out, to[i]), RowAt(x, i), bytes);
    }
  });
}

void CpuKernels::ScatterAddRows(Stream& stream, const Tensor& x,
                                const Tensor& rows, const Tensor& out) {
  if (!stream.ok() || out.bytes() == 0) return;
  GW_CHECK(x.dtype() == out.dtype() && x.dim(1) == out.dim(1));
  const int64_t cols = x.dim(1);
  // The rows of x of each row of out, in order: first[r], next[first[r]], ...
  const int32_t* to = rows.data<int32_t>();
  std::vector<int64_t> first(static_cast<size_t>(out.dim(0)), -1);
  std::vector<int64_t> next(static_cast<size_t>(rows.dim(0)), -1);
  for (int64_t i = rows.dim(0) - 1; i >= 0; --i) {
    int64_t& head = first[static_cast<size_t>(to[i])];
    next[static_cast<size_t>(i)] = head;
    head = i;
  }
  ThreadPool& pool = Pool(stream);
  const int threads = pool.num_threads();
  scratch_.Reserve(threads, cols * 4);
  pool.Run([&](int thread) {
    float* sums = reinterpret_cast<float*>(scratch_.part(thread));
    const int64_t begin = out.dim(0) * thread / threads;
    const int64_t end = out.dim(0) * (thread + 1) / threads;
    for (int64_t r = begin; r < end; ++r) {
      int64_t i = first[static_cast<size_t>(r)];
      if (i >= 0 && next[static_cast<size_t>(i)] < 0) {
        std::memcpy(RowAt(out, r), RowAt(x, i),
                    static_cast<size_t>(cols * DTypeBytes(x.dtype())));
        continue;
      }
      std::fill_n(sums, cols, 0.0f);
      for (; i >= 0; i = next[static_cast<size_t>(i)]) {
        if (x.dtype() == DType::kBF16) {
          HWY_DYNAMIC_DISPATCH(AddWide)
          (reinterpret_cast<const BFloat16*>(RowAt(x, i)), cols, sums);
        } else {
          AddTo(reinterpret_cast<const float*>(RowAt(x, i)), cols, sums);
        }
      }
      StoreRows(x.dtype(), {.cols = cols, .from = sums, .to = RowAt(out, r)});
    }
  });
}

void CpuKernels::Cast(Stream& stream, const Tensor& from, const Tensor& to) {
  if (!stream.ok()) return;
  const int64_t n = from.num_elements();
  GW_CHECK(to.num_elements() == n);
  Pool(stream).ParallelFor(n, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    if (from.dtype() == to.dtype()) {
      const int64_t bytes = DTypeBytes(from.dtype());
      std::memcpy(static_cast<char*>(to.raw()) + begin * bytes,
                  static_cast<const char*>(from.raw()) + begin * bytes,
                  static_cast<size_t>(count * bytes));
    } else if (to.dtype() == DType::kBF16) {
      Narrow(from.data<float>() + begin, count, to.data<BFloat16>() + begin);
    } else {
      Widen(from.data<BFloat16>() + begin, count, to.data<float>() + begin);
    }
  });
}

void CpuKernels::Add(Stream& stream, const Tensor& x, const Tensor& y) {
  if (!stream.ok()) return;
  const int64_t n = x.num_elements();
  GW_CHECK(y.num_elements() == n && x.dtype() == y.dtype());
  Pool(stream).ParallelFor(n, kGrain, [&](int64_t begin, int64_t end) {
    if (x.dtype() == DType::kBF16) {
      HWY_DYNAMIC_DISPATCH(AddBF16)
      (x.data<BFloat16>() + begin, end - begin, y.data<BFloat16>() + begin);
    } else {
      HWY_DYNAMIC_DISPATCH(AddF32)
      (x.data<float>() + begin, end - begin, y.data<float>() + begin);
    }
  });
}

}  // namespace gradwire
#endif
