// SPDX-License-Identifier: Apache-2.0
// Copies of rows, casts. Bound by memory: every row that is written is written
// once, zeros included. So scattering gathers: by an index that is made first,
// of what goes to each row.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/elementwise.h"

namespace gradwire {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65535;

// ---- Copies -----------------------------------------------------------------

// `lanes`, a power of two, neighbouring threads take a row.
struct RowThreads {
  int64_t row, column;
  int64_t row_step;
  int lanes;
};
__device__ inline RowThreads RowThreadsOf(int lanes) {
  const auto thread = static_cast<int>(threadIdx.x);
  const int rows = kThreads / lanes;
  return {static_cast<int64_t>(blockIdx.x) * rows + thread / lanes,
          thread % lanes, static_cast<int64_t>(gridDim.x) * rows, lanes};
}

// to[r] = from[rows[r]], or 0 if rows[r] < 0: `count` rows of `width` V.
template <class V>
__global__ void __launch_bounds__(kThreads)
    GatherKernel(const V* from, const int32_t* rows, int64_t count,
                 int64_t width, int lanes, V* to) {
  const RowThreads at = RowThreadsOf(lanes);
  for (int64_t r = at.row; r < count; r += at.row_step) {
    const int64_t row = rows[r];
    for (int64_t c = at.column; c < width; c += at.lanes) {
      V value = {};
      if (row >= 0) value = from[row * width + c];
      to[r * width + c] = value;
    }
  }
}

// inverse[rows[i] - begin] = i, where that is in [0, count).
__global__ void __launch_bounds__(kThreads)
    InvertKernel(const int32_t* rows, int64_t n, int64_t begin, int64_t count,
                 int32_t* inverse) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < n; i += step) {
    const int64_t row = rows[i] - begin;
    if (row >= 0 && row < count) inverse[row] = static_cast<int32_t>(i);
  }
}

dim3 BlocksFor(int64_t rows, int rows_of_block) {
  return dim3(static_cast<unsigned>(
      std::min((rows + rows_of_block - 1) / rows_of_block, kMaxBlocks)));
}

template <class V>
cudaError_t Gather(const Tensor& from, const int32_t* rows, const Tensor& to,
                   cudaStream_t stream) {
  const int64_t count = to.dim(0);
  const int64_t width = to.bytes() / count / static_cast<int64_t>(sizeof(V));
  int lanes = 1;
  while (lanes < kThreads && lanes < width) lanes *= 2;
  return Launch(GatherKernel<V>, BlocksFor(count, kThreads / lanes),
                dim3(kThreads), 0, stream, static_cast<const V*>(from.raw()),
                rows, count, width, lanes, static_cast<V*>(to.raw()));
}

// Of whatever element type: as pieces as large as addresses and rows allow.
cudaError_t GatherBytes(const Tensor& from, const int32_t* rows,
                        const Tensor& to, cudaStream_t stream) {
  const int64_t row_bytes = to.bytes() / to.dim(0);
  const auto are_whole = [&](int64_t bytes) {
    return row_bytes % bytes == 0 &&
           AreAligned(static_cast<std::uintptr_t>(bytes), from.raw(), to.raw());
  };
  if (are_whole(16)) {
    return Gather<Pack<uint32_t, 4>>(from, rows, to, stream);
  }
  if (are_whole(4)) return Gather<uint32_t>(from, rows, to, stream);
  return Gather<uint16_t>(from, rows, to, stream);
}

// ---- Casts ------------------------------------------------------------------

template <class From, class To>
struct CastOp {
  // Of float32, 16 bytes.
  static constexpr int kPack = kPackOf<float>;
  const From* from;
  To* to;

  bool IsAligned() const {
    return AreAligned(sizeof(From) * kPack, from) &&
           AreAligned(sizeof(To) * kPack, to);
  }
  template <int kN>
  __device__ Pack<From, kN> Load(int64_t i) const {
    return LoadPack<kN>(from + i);
  }
  template <int kN>
  __device__ void Store(int64_t i, const Pack<From, kN>& loaded) const {
    Pack<To, kN> out;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      out.element[j] = To(static_cast<float>(loaded.element[j]));
    }
    StorePack(to + i, out);
  }
};

template <class T, int kN>
struct TwoPacks {
  Pack<T, kN> x, y;
};

template <class T>
struct AddOp {
  static constexpr int kPack = kPackOf<T>;
  const T* x;
  T* y;

  bool IsAligned() const { return AreAligned(16, x, y); }
  template <int kN>
  __device__ TwoPacks<T, kN> Load(int64_t i) const {
    return {LoadPack<kN>(x + i), LoadPack<kN>(static_cast<const T*>(y) + i)};
  }
  template <int kN>
  __device__ void Store(int64_t i, const TwoPacks<T, kN>& loaded) const {
    Pack<T, kN> out;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      out.element[j] = T(static_cast<float>(loaded.y.element[j]) +
                         static_cast<float>(loaded.x.element[j]));
    }
    StorePack(y + i, out);
  }
};

}  // namespace

void CudaKernels::GatherRows(Stream& stream, const Tensor& x,
                             const Tensor& rows, const Tensor& out) {
  if (!stream.ok() || out.bytes() == 0) return;
  GW_CHECK(x.dtype() == out.dtype() && x.dim(1) == out.dim(1));
  GW_CHECK(rows.dim(0) == out.dim(0));
  CudaStream& cuda = Cuda(stream);
  cuda.Check(GatherBytes(x, rows.data<int32_t>(), out, cuda.get()),
             "gathering rows");
}

void CudaKernels::ScatterRows(Stream& stream, const Tensor& x,
                              const Tensor& rows, const Tensor& out) {
  if (!stream.ok() || out.bytes() == 0) return;
  GW_CHECK(x.dtype() == out.dtype() && x.dim(1) == out.dim(1));
  CudaStream& cuda = Cuda(stream);
  constexpr int64_t kTurn = kScratchBytes / sizeof(int32_t);
  for (int64_t begin = 0; begin < out.dim(0); begin += kTurn) {
    const int64_t count = std::min(out.dim(0) - begin, kTurn);
    int32_t* const inverse = Scratch<int32_t>(count);
    // -1 everywhere.
    cuda.Check(
        QueueMemset(inverse, 0xff,
                    count * static_cast<int64_t>(sizeof(int32_t)), cuda.get()),
        "scattering rows");
    if (rows.dim(0) > 0) {
      cuda.Check(Launch(InvertKernel, BlocksFor(rows.dim(0), kThreads),
                        dim3(kThreads), 0, cuda.get(),
                        static_cast<const int32_t*>(rows.data<int32_t>()),
                        rows.dim(0), begin, count, inverse),
                 "scattering rows");
    }
    cuda.Check(
        GatherBytes(x, inverse, out.Rows(begin, begin + count), cuda.get()),
        "scattering rows");
  }
}

void CudaKernels::Cast(Stream& stream, const Tensor& from, const Tensor& to) {
  if (!stream.ok() || from.num_elements() == 0) return;
  const int64_t n = from.num_elements();
  GW_CHECK(to.num_elements() == n);
  CudaStream& cuda = Cuda(stream);
  if (from.dtype() == to.dtype()) {
    cuda.Check(QueueCopy(to.raw(), from.raw(), from.bytes(), cuda.get()),
               "a cast");
  } else if (to.dtype() == DType::kBF16) {
    cuda.Check(Elementwise(CastOp<float, BFloat16>{from.data<float>(),
                                                   to.data<BFloat16>()},
                           n, cuda.get()),
               "a cast");
  } else {
    cuda.Check(Elementwise(CastOp<BFloat16, float>{from.data<BFloat16>(),
                                                   to.data<float>()},
                           n, cuda.get()),
               "a cast");
  }
}

void CudaKernels::Add(Stream& stream, const Tensor& x, const Tensor& y) {
  if (!stream.ok() || x.num_elements() == 0) return;
  const int64_t n = x.num_elements();
  GW_CHECK(y.num_elements() == n && x.dtype() == y.dtype());
  CudaStream& cuda = Cuda(stream);
  cuda.Check(
      x.dtype() == DType::kBF16
          ? Elementwise(AddOp<BFloat16>{x.data<BFloat16>(), y.data<BFloat16>()},
                        n, cuda.get())
          : Elementwise(AddOp<float>{x.data<float>(), y.data<float>()}, n,
                        cuda.get()),
      "a sum of vectors");
}

}  // namespace gradwire
