// SPDX-License-Identifier: Apache-2.0
// Bound by memory. A warp takes 32 packs of columns, and with the other warps
// of its block every so many rows of them: so the forward reads the bias once
// and the backward sums in registers.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
// Rows for a warp, at least: what a block costs beside them is then little.
constexpr int64_t kRowsOfWarp = 4;
// Blocks that fill any GPU. More would only leave more sums to add.
constexpr int64_t kMaxBlocks = 1056;

// The first column that this thread works on.
template <int kN>
__device__ inline int64_t FirstColumn() {
  return (static_cast<int64_t>(blockIdx.x) * kWarpSize +
          threadIdx.x % kWarpSize) *
         kN;
}
// The first row that this thread works on, and how far it is to the next.
__device__ inline int64_t FirstRow() {
  return static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.x / kWarpSize;
}
__device__ inline int64_t RowStep() {
  return static_cast<int64_t>(gridDim.y) * kWarps;
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(const T* bias, int64_t tokens, int64_t n, T* y) {
  const int64_t column = FirstColumn<kN>();
  if (column >= n) return;
  const Pack<T, kN> added = LoadPack<kN>(bias + column);
#pragma unroll 4
  for (int64_t t = FirstRow(); t < tokens; t += RowStep()) {
    Pack<T, kN> row = LoadPack<kN>(y + t * n + column);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      row.element[j] = T(static_cast<float>(row.element[j]) +
                         static_cast<float>(added.element[j]));
    }
    StorePack(y + t * n + column, row);
  }
}

// partials f32 [gridDim.y, n] =: each the sum of its blocks' rows.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(const T* d_y, int64_t tokens, int64_t n, float* partials) {
  SharedMemory memory;
  const SharedArray<float> of_warps = memory.Take<float>(kThreads * kN);
  const int64_t column = FirstColumn<kN>();
  float sum[kN] = {};
  if (column < n) {
#pragma unroll 4
    for (int64_t t = FirstRow(); t < tokens; t += RowStep()) {
      const Pack<T, kN> row = LoadPack<kN>(d_y + t * n + column);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        sum[j] += static_cast<float>(row.element[j]);
      }
    }
  }
  // Neighbours in a warp write neighbours.
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int j = 0; j < kN; ++j) of_warps[j * kThreads + thread] = sum[j];
  __syncthreads();
  if (thread >= kWarpSize || column >= n) return;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    for (int warp = 1; warp < kWarps; ++warp) {
      sum[j] += of_warps[j * kThreads + warp * kWarpSize + thread];
    }
    partials[blockIdx.y * n + column + j] = sum[j];
  }
}

// Tiles of columns, by as many strips of rows as fill the GPU.
template <int kN>
dim3 GridFor(int64_t tokens, int64_t n) {
  constexpr int64_t kColumns = kWarpSize * kN;
  const int64_t tiles = (n + kColumns - 1) / kColumns;
  const int64_t rows = kWarps * kRowsOfWarp;
  const int64_t strips =
      std::min((tokens + rows - 1) / rows, (kMaxBlocks + tiles - 1) / tiles);
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(strips));
}

template <typename T, int kN>
cudaError_t Forward(const Tensor& bias, const Tensor& y, cudaStream_t stream) {
  return Launch(ForwardKernel<T, kN>, GridFor<kN>(y.dim(0), y.dim(1)),
                dim3(kThreads), 0, stream,
                static_cast<const T*>(bias.data<T>()), y.dim(0), y.dim(1),
                y.data<T>());
}

template <typename T>
cudaError_t Forward(const Tensor& bias, const Tensor& y, cudaStream_t stream) {
  return ArePacked<T>(y.dim(1), bias.raw(), y.raw())
             ? Forward<T, kPackOf<T>>(bias, y, stream)
             : Forward<T, 1>(bias, y, stream);
}

// `partials` has room for kMaxBlocks blocks' sums of their columns, and for n
// where these are more tiles than blocks.
template <typename T, int kN>
cudaError_t Backward(const Tensor& d_y, float* partials, const Tensor& d_bias,
                     cudaStream_t stream) {
  const int64_t tokens = d_y.dim(0), n = d_y.dim(1);
  const dim3 grid = GridFor<kN>(tokens, n);
  const cudaError_t error =
      Launch(BackwardKernel<T, kN>, grid, dim3(kThreads),
             sizeof(float) * kThreads * kN, stream,
             static_cast<const T*>(d_y.data<T>()), tokens, n, partials);
  if (error != cudaSuccess) return error;
  return AddColumnSums(partials, grid.y, n, n, d_bias.data<float>(), stream);
}

template <typename T>
cudaError_t Backward(const Tensor& d_y, float* partials, const Tensor& d_bias,
                     cudaStream_t stream) {
  return ArePacked<T>(d_y.dim(1), d_y.raw())
             ? Backward<T, kPackOf<T>>(d_y, partials, d_bias, stream)
             : Backward<T, 1>(d_y, partials, d_bias, stream);
}

}  // namespace

void CudaKernels::BiasForward(Stream& stream, const Tensor& bias,
                              const Tensor& y) {
  if (!stream.ok() || y.num_elements() == 0) return;
  GW_CHECK(bias.num_elements() == y.dim(1));
  CudaStream& cuda = Cuda(stream);
  cuda.Check(y.dtype() == DType::kBF16 ? Forward<BFloat16>(bias, y, cuda.get())
                                       : Forward<float>(bias, y, cuda.get()),
             "a bias");
}

void CudaKernels::BiasBackward(Stream& stream, const Tensor& d_y,
                               const Tensor& d_bias) {
  if (!stream.ok() || d_y.num_elements() == 0) return;
  const int64_t n = d_y.dim(1);
  GW_CHECK(d_bias.num_elements() == n);
  CudaStream& cuda = Cuda(stream);
  auto* partials =
      Scratch<float>(n + kMaxBlocks * kWarpSize * kPackOf<BFloat16>);
  cuda.Check(d_y.dtype() == DType::kBF16
                 ? Backward<BFloat16>(d_y, partials, d_bias, cuda.get())
                 : Backward<float>(d_y, partials, d_bias, cuda.get()),
             "a bias's gradient");
}

}  // namespace gradwire
