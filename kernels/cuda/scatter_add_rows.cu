// SPDX-License-Identifier: Apache-2.0
// Sums of rows in a fixed order, each row of the output written once. Bound by
// memory: first the terms of each row are noted, whose order depends on which
// thread comes first; whoever adds them up sorts them.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65535;

// Of a row of the output: which rows of x go to it, as far as they are noted,
// in no particular order.
constexpr int kNoted = kWarpSize;
struct Terms {
  int32_t* count;  // [rows]
  int32_t* noted;  // [rows, kNoted]
};

// For rows [begin, begin + count).
__global__ void __launch_bounds__(kThreads)
    NoteTermsKernel(const int32_t* rows, int64_t n, int64_t begin,
                    int64_t count, Terms terms) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < n; i += step) {
    const int64_t row = rows[i] - begin;
    if (row < 0 || row >= count) continue;
    const int place = atomicAdd(terms.count + row, 1);
    if (place < kNoted) {
      terms.noted[row * kNoted + place] = static_cast<int32_t>(i);
    }
  }
}

// The values of a warp's lanes in ascending order, by a bitonic network.
__device__ inline int32_t SortLanes(int32_t value) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int size = 2; size <= kWarpSize; size *= 2) {
#pragma unroll
    for (int distance = size / 2; distance > 0; distance /= 2) {
      const int32_t other = __shfl_xor_sync(kAllLanes, value, distance);
      const bool less = ((lane & distance) == 0) == ((lane & size) == 0);
      value = (value < other) == less ? value : other;
    }
  }
  return value;
}

template <class T>
struct RowSums {
  const T* x;           // [n, width]
  const int32_t* rows;  // [n]
  int64_t n, width;
  int64_t begin, count;  // rows of `out` that this launch makes
  T* out;                // [.., width]
};

template <int kN, class T>
__device__ inline void AddPack(const T* x, float (&sums)[kN]) {
  const Pack<T, kN> pack = LoadPack<kN>(x);
#pragma unroll
  for (int j = 0; j < kN; ++j) sums[j] += static_cast<float>(pack.element[j]);
}

// A block makes a row of the output, a thread kN of its columns. Every warp
// sorts the row's terms for itself: most rows have one or none. A row with more
// than were noted looks through all of `rows`; there are at most n / kNoted
// such.
template <int kN, class T>
__global__ void __launch_bounds__(kThreads)
    SumRowsKernel(RowSums<T> args, Terms terms) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int64_t r = blockIdx.x; r < args.count; r += gridDim.x) {
    const int32_t count = terms.count[r];
    int32_t term = INT32_MAX;
    if (lane < count && count <= kNoted) term = terms.noted[r * kNoted + lane];
    if (count > 1 && count <= kNoted) term = SortLanes(term);
    // Whole warps go round, since all lanes have a part in finding the terms.
    for (int64_t first = 0; first < args.width; first += blockDim.x * kN) {
      const int64_t column = first + threadIdx.x * kN;
      const bool there = column < args.width;
      const T* const x = args.x + column;
      float sums[kN] = {};
      if (count <= kNoted) {
        for (int32_t t = 0; t < count; ++t) {
          const int64_t i = __shfl_sync(kAllLanes, term, t);
          if (there) AddPack<kN>(x + i * args.width, sums);
        }
      } else {
        for (int64_t base = 0; base < args.n; base += kWarpSize) {
          const bool mine =
              base + lane < args.n && args.rows[base + lane] == args.begin + r;
          unsigned found = __ballot_sync(kAllLanes, mine);
          for (; found != 0; found &= found - 1) {
            const int64_t i = base + __ffs(static_cast<int>(found)) - 1;
            if (there) AddPack<kN>(x + i * args.width, sums);
          }
        }
      }
      if (!there) continue;
      Pack<T, kN> out;
#pragma unroll
      for (int j = 0; j < kN; ++j) out.element[j] = T(sums[j]);
      StorePack(args.out + (args.begin + r) * args.width + column, out);
    }
  }
}

dim3 BlocksFor(int64_t rows, int rows_of_block) {
  return dim3(static_cast<unsigned>(
      std::min((rows + rows_of_block - 1) / rows_of_block, kMaxBlocks)));
}

template <int kN, class T>
cudaError_t SumRows(const RowSums<T>& args, const Terms& terms,
                    cudaStream_t stream) {
  const int64_t packs = (args.width + kN - 1) / kN;
  const int64_t warps = std::min<int64_t>((packs + kWarpSize - 1) / kWarpSize,
                                          kThreads / kWarpSize);
  return Launch(SumRowsKernel<kN, T>, BlocksFor(args.count, 1),
                dim3(static_cast<unsigned>(warps * kWarpSize)), 0, stream, args,
                terms);
}

template <class T>
cudaError_t SumRows(const RowSums<T>& args, const Terms& terms,
                    cudaStream_t stream) {
  return ArePacked<T>(args.width, args.x, args.out)
             ? SumRows<kPackOf<T>>(args, terms, stream)
             : SumRows<1>(args, terms, stream);
}

template <class T>
RowSums<T> RowSumsOf(const Tensor& x, const Tensor& rows, const Tensor& out) {
  return {x.data<T>(), rows.data<int32_t>(), rows.dim(0), out.dim(1), 0,
          0,           out.data<T>()};
}

}  // namespace

void CudaKernels::ScatterAddRows(Stream& stream, const Tensor& x,
                                 const Tensor& rows, const Tensor& out) {
  if (!stream.ok() || out.bytes() == 0) return;
  GW_CHECK(x.dtype() == out.dtype() && x.dim(1) == out.dim(1));
  CudaStream& cuda = Cuda(stream);
  const int64_t n = rows.dim(0);
  constexpr int64_t kTurn = kScratchBytes / ((kNoted + 1) * sizeof(int32_t));
  for (int64_t begin = 0; begin < out.dim(0); begin += kTurn) {
    const int64_t count = std::min(out.dim(0) - begin, kTurn);
    int32_t* const noted = Scratch<int32_t>(count * (kNoted + 1));
    const Terms terms = {noted + count * kNoted, noted};
    cuda.Check(
        QueueMemset(terms.count, 0,
                    count * static_cast<int64_t>(sizeof(int32_t)), cuda.get()),
        "adding rows");
    if (n > 0) {
      cuda.Check(
          Launch(NoteTermsKernel, BlocksFor(n, kThreads), dim3(kThreads), 0,
                 cuda.get(), static_cast<const int32_t*>(rows.data<int32_t>()),
                 n, begin, count, terms),
          "adding rows");
    }
    const auto sum = [&](auto args) {
      args.begin = begin;
      args.count = count;
      return SumRows(args, terms, cuda.get());
    };
    cuda.Check(x.dtype() == DType::kBF16
                   ? sum(RowSumsOf<BFloat16>(x, rows, out))
                   : sum(RowSumsOf<float>(x, rows, out)),
               "adding rows");
  }
}

}  // namespace gradwire
