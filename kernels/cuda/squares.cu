// SPDX-License-Identifier: Apache-2.0
// Bound by memory. A warp takes the kSquareBlock columns of one sum, eight
// elements a lane, and adds its lanes in an order that never changes; sums are
// added by chunks whose size depends on nothing, and then the chunks' sums by
// one block.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarps = kThreads / kWarpSize;
// Several waves on any GPU.
constexpr int64_t kMaxBlocks = 8192;

// A float32's square is exact in float64.
__device__ inline double Square(float x) {
  return static_cast<double>(x) * static_cast<double>(x);
}

// Of the block that begins at x and has `columns` columns, the lane's part.
template <bool kPacked>
__device__ inline double LaneSquares(const float* x, int64_t columns) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  double sum = 0;
  if (kPacked && columns >= kSquareBlock) {
    constexpr int kN = kPackOf<float>, kStep = kN * kWarpSize;
    constexpr int kPacks = kSquareBlock / kStep;
    Pack<float, kN> packs[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      packs[j] = LoadPack<kN>(x + j * kStep + lane * kN);
    }
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
#pragma unroll
      for (int e = 0; e < kN; ++e) sum += Square(packs[j].element[e]);
    }
  } else {
    for (int64_t i = lane; i < columns && i < kSquareBlock; i += kWarpSize) {
      sum += Square(x[i]);
    }
  }
  return sum;
}

// x [rows, columns]; squares [rows, blocks] =.
template <bool kPacked>
__global__ void __launch_bounds__(kThreads)
    RowSquaresKernel(const float* x, int64_t rows, int64_t columns,
                     double* squares) {
  const int64_t blocks = (columns + kSquareBlock - 1) / kSquareBlock;
  const int64_t first = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  // Divisions take as long as the loads do: they are made once.
  const int64_t step = gridDim.x * kWarps;
  const int64_t row_step = step / blocks, block_step = step % blocks;
  int64_t row = first / blocks, block = first % blocks;
  while (row < rows) {
    const int64_t begin = block * kSquareBlock;
    const double sum = WarpSum(
        LaneSquares<kPacked>(x + row * columns + begin, columns - begin));
    if (threadIdx.x % kWarpSize == 0) squares[row * blocks + block] = sum;
    row += row_step;
    block += block_step;
    if (block >= blocks) {
      block -= blocks;
      ++row;
    }
  }
}

// Elements of one partial sum.
constexpr int64_t kChunk = 1 << 13;

// Of the chunk that this block takes: partial[block] =.
__global__ void __launch_bounds__(kThreads)
    ChunkSumsKernel(const double* x, int64_t n, double* partial) {
  SharedMemory memory;
  const SharedArray<double> shared = memory.Take<double>(kWarps);
  const int64_t begin = blockIdx.x * kChunk;
  const int64_t end = begin + kChunk < n ? begin + kChunk : n;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += x[i];
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// partial[chunks] = the sum of the others, by one block.
__global__ void __launch_bounds__(kThreads)
    TotalKernel(double* partial, int64_t chunks) {
  SharedMemory memory;
  const SharedArray<double> shared = memory.Take<double>(kWarps);
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[i];
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) partial[chunks] = sum;
}

constexpr std::size_t kSharedBytes = kWarps * sizeof(double);

}  // namespace

void CudaKernels::RowSquares(Stream& stream, const Tensor& x,
                             const Tensor& squares) {
  if (!stream.ok() || x.num_elements() == 0) return;
  const int64_t rows = x.dim(0), columns = x.dim(1);
  const int64_t blocks = SquareBlocks(columns);
  GW_CHECK(squares.dim(0) == rows && squares.dim(1) == blocks);
  const auto grid = static_cast<unsigned>(
      std::min((rows * blocks + kWarps - 1) / kWarps, kMaxBlocks));
  CudaStream& cuda = Cuda(stream);
  cuda.Check(
      Launch(ArePacked<float>(columns, x.raw()) ? RowSquaresKernel<true>
                                                : RowSquaresKernel<false>,
             dim3(grid), dim3(kThreads), 0, cuda.get(),
             static_cast<const float*>(x.data<float>()), rows, columns,
             squares.data<double>()),
      "sums of squares");
}

double CudaKernels::Sum(Stream& stream, const Tensor& x) {
  if (!stream.ok()) return 0;
  const int64_t n = x.num_elements();
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  double* const partial = Scratch<double>(chunks + 1);
  CudaStream& cuda = Cuda(stream);
  if (chunks > 0) {
    cuda.Check(Launch(ChunkSumsKernel, dim3(static_cast<unsigned>(chunks)),
                      dim3(kThreads), kSharedBytes, cuda.get(),
                      static_cast<const double*>(x.data<double>()), n, partial),
               "sums of chunks");
  }
  cuda.Check(Launch(TotalKernel, dim3(1), dim3(kThreads), kSharedBytes,
                    cuda.get(), partial, chunks),
             "a sum");
  double total = 0;
  cuda.Check(cudaMemcpyAsync(&total, partial + chunks, sizeof(total),
                             cudaMemcpyDeviceToHost, cuda.get()),
             "fetching a sum");
  // Whatever has failed: nothing may write to `total` later.
  cuda.Check(cudaStreamSynchronize(cuda.get()), "fetching a sum");
  return stream.ok() ? total : 0;
}

}  // namespace gradwire
