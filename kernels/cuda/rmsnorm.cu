// SPDX-License-Identifier: Apache-2.0
// Bound by memory: a block takes a row and keeps it in registers between the
// two visits that a norm pays, so that it is read once; of rows too wide for
// that, the rest is read again, from a cache. Blocks are as small as hold a
// row: then many rows are in flight, and narrow ones need no barrier.
//
// In the backward a block takes one row after the other and sums d_weight over
// them, also in registers.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {
namespace {

// Packs of a row that a thread keeps.
constexpr int kHeld = 4;
constexpr int kMaxThreads = 512;
// The backward holds three times as much, and sums.
constexpr int kMaxBackwardThreads = 384;
// Threads of all blocks of the backward, and rows of one at least: as many as
// a GPU holds at a time, with enough rows each that their sums of d_weight are
// few beside what was read.
constexpr int64_t kBackwardThreads = int64_t{132} * kMaxBackwardThreads;
constexpr int64_t kBackwardRows = 4;

constexpr int kSharedBytes = kMaxThreads / kWarpSize * sizeof(float);

template <typename T>
struct NormForward {
  const T* x;
  const T* delta;  // or null
  const T* weight;
  T* sum;  // where there is a delta
  T* y;
  float* rstd;
  int64_t hidden;
  float eps;
};

// x, or the sum of x and delta as it is stored.
template <typename T, int kN>
__device__ inline Pack<T, kN> LoadOrAdd(const NormForward<T>& args,
                                        int64_t at) {
  Pack<T, kN> x = LoadPack<kN>(args.x + at);
  if (args.delta == nullptr) return x;
  const Pack<T, kN> delta = LoadPack<kN>(args.delta + at);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    x.element[j] = T(static_cast<float>(x.element[j]) +
                     static_cast<float>(delta.element[j]));
  }
  StorePack(args.sum + at, x);
  return x;
}

template <typename T, int kN>
__device__ inline float Squares(const Pack<T, kN>& x) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const auto v = static_cast<float>(x.element[j]);
    sum = fmaf(v, v, sum);
  }
  return sum;
}

template <typename T, int kN>
__device__ inline void StoreNormed(const Pack<T, kN>& x, float rstd,
                                   const T* weight, T* y) {
  const Pack<T, kN> w = LoadPack<kN>(weight);
  Pack<T, kN> out;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    out.element[j] = T(static_cast<float>(x.element[j]) * rstd *
                       static_cast<float>(w.element[j]));
  }
  StorePack(y, out);
}

// A block for each row.
template <typename T, int kN>
__global__ void __launch_bounds__(kMaxThreads)
    ForwardKernel(NormForward<T> args) {
  SharedMemory memory;
  const SharedArray<float> room = memory.Take<float>(kMaxThreads / kWarpSize);
  const int64_t hidden = args.hidden;
  const int64_t row = blockIdx.x * hidden;
  const int step = static_cast<int>(blockDim.x) * kN;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kN;
  Pack<T, kN> held[kHeld];
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kHeld; ++p) {
    const int64_t column = first + p * step;
    if (column >= hidden) continue;
    held[p] = LoadOrAdd<T, kN>(args, row + column);
    squares += Squares(held[p]);
  }
  for (int64_t column = first + kHeld * step; column < hidden; column += step) {
    squares += Squares(LoadOrAdd<T, kN>(args, row + column));
  }
  const float mean = BlockSum(squares, room) / static_cast<float>(hidden);
  const float rstd = 1.0f / sqrtf(mean + args.eps);
  if (threadIdx.x == 0) args.rstd[blockIdx.x] = rstd;
#pragma unroll
  for (int p = 0; p < kHeld; ++p) {
    const int64_t column = first + p * step;
    if (column >= hidden) continue;
    StoreNormed(held[p], rstd, args.weight + column, args.y + row + column);
  }
  // What this thread has stored, or x.
  const T* again = args.delta == nullptr ? args.x : args.sum;
  for (int64_t column = first + kHeld * step; column < hidden; column += step) {
    StoreNormed(LoadPack<kN>(again + row + column), rstd, args.weight + column,
                args.y + row + column);
  }
}

template <typename T>
struct NormBackward {
  const T* d_y;
  const T* x;
  const T* weight;
  const float* rstd;
  T* d_x;
  float* partials;  // [blocks, hidden], =: sums of d_y * n over a block's rows
  int64_t tokens, hidden;
};

// Of one pack: adds d_y * n to `products` and returns its product with weight.
template <typename T, int kN>
__device__ inline float AddProducts(const Pack<T, kN>& x,
                                    const Pack<T, kN>& d_y, float rstd,
                                    const T* weight, float* products) {
  const Pack<T, kN> w = LoadPack<kN>(weight);
  float dot = 0;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const float product = static_cast<float>(d_y.element[j]) *
                          (static_cast<float>(x.element[j]) * rstd);
    products[j] += product;
    dot = fmaf(product, static_cast<float>(w.element[j]), dot);
  }
  return dot;
}

// d_x + rstd * (g - n * mean).
template <typename T, int kN>
__device__ inline Pack<T, kN> AddGradient(const Pack<T, kN>& x,
                                          const Pack<T, kN>& d_y, float rstd,
                                          const T* weight, float mean,
                                          Pack<T, kN> d_x) {
  const Pack<T, kN> w = LoadPack<kN>(weight);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const float g =
        static_cast<float>(d_y.element[j]) * static_cast<float>(w.element[j]);
    const float n = static_cast<float>(x.element[j]) * rstd;
    d_x.element[j] =
        T(static_cast<float>(d_x.element[j]) + rstd * (g - n * mean));
  }
  return d_x;
}

template <typename T, int kN>
__global__ void __launch_bounds__(kMaxBackwardThreads)
    BackwardKernel(NormBackward<T> args) {
  SharedMemory memory;
  const SharedArray<float> room = memory.Take<float>(kMaxThreads / kWarpSize);
  const int64_t hidden = args.hidden;
  const int step = static_cast<int>(blockDim.x) * kN;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kN;
  float* partials = args.partials + blockIdx.x * hidden;
  float sums[kHeld][kN] = {};
  // Those that are not held are summed where they are to be.
  for (int64_t column = first + kHeld * step; column < hidden; column += step) {
    for (int j = 0; j < kN; ++j) partials[column + j] = 0;
  }
  for (int64_t t = blockIdx.x; t < args.tokens; t += gridDim.x) {
    const T* d_y = args.d_y + t * hidden;
    const T* x = args.x + t * hidden;
    T* d_x = args.d_x + t * hidden;
    const float rstd = args.rstd[t];
    Pack<T, kN> held_d_y[kHeld], held_x[kHeld], held_d_x[kHeld];
#pragma unroll
    for (int p = 0; p < kHeld; ++p) {
      const int64_t column = first + p * step;
      if (column >= hidden) continue;
      held_d_y[p] = LoadPack<kN>(d_y + column);
      held_x[p] = LoadPack<kN>(x + column);
      held_d_x[p] = LoadPack<kN>(d_x + column);
    }
    float dot = 0;
#pragma unroll
    for (int p = 0; p < kHeld; ++p) {
      const int64_t column = first + p * step;
      if (column >= hidden) continue;
      dot += AddProducts(held_x[p], held_d_y[p], rstd, args.weight + column,
                         sums[p]);
    }
    for (int64_t column = first + kHeld * step; column < hidden;
         column += step) {
      dot += AddProducts(LoadPack<kN>(x + column), LoadPack<kN>(d_y + column),
                         rstd, args.weight + column, partials + column);
    }
    const float mean = BlockSum(dot, room) / static_cast<float>(hidden);
#pragma unroll
    for (int p = 0; p < kHeld; ++p) {
      const int64_t column = first + p * step;
      if (column >= hidden) continue;
      StorePack(d_x + column,
                AddGradient(held_x[p], held_d_y[p], rstd, args.weight + column,
                            mean, held_d_x[p]));
    }
    for (int64_t column = first + kHeld * step; column < hidden;
         column += step) {
      StorePack(d_x + column, AddGradient(LoadPack<kN>(x + column),
                                          LoadPack<kN>(d_y + column), rstd,
                                          args.weight + column, mean,
                                          LoadPack<kN>(d_x + column)));
    }
  }
#pragma unroll
  for (int p = 0; p < kHeld; ++p) {
    const int64_t column = first + p * step;
    if (column >= hidden) continue;
#pragma unroll
    for (int j = 0; j < kN; ++j) partials[column + j] = sums[p][j];
  }
}

// The fewest that hold a row.
int ThreadsFor(int64_t packs, int most) {
  const int64_t threads = (packs + kHeld - 1) / kHeld;
  return static_cast<int>(std::min<int64_t>(
      (threads + kWarpSize - 1) / kWarpSize * kWarpSize, most));
}

template <typename T>
cudaError_t Forward(const NormForward<T>& args, int64_t tokens,
                    cudaStream_t stream) {
  const bool packed = ArePacked<T>(args.hidden, args.x, args.delta, args.weight,
                                   args.sum, args.y);
  return Launch(packed ? ForwardKernel<T, kPackOf<T>> : ForwardKernel<T, 1>,
                dim3(static_cast<unsigned>(tokens)),
                dim3(static_cast<unsigned>(ThreadsFor(
                    args.hidden / (packed ? kPackOf<T> : 1), kMaxThreads))),
                kSharedBytes, stream, args);
}

template <typename T>
cudaError_t Forward(const Kernels::AddRmsNorm& args, const Tensor& sum,
                    const Tensor& y, const Tensor& rstd, cudaStream_t stream) {
  return Forward<T>(
      {args.x.data<T>(), args.delta.data<T>(), args.weight.data<T>(),
       sum.data<T>(), y.data<T>(), rstd.data<float>(), y.dim(1), args.eps},
      y.dim(0), stream);
}

template <typename T>
cudaError_t Backward(NormBackward<T> args, const Tensor& d_weight,
                     cudaStream_t stream) {
  const int64_t hidden = args.hidden;
  const bool packed =
      ArePacked<T>(hidden, args.d_y, args.x, args.weight, args.d_x);
  const int threads =
      ThreadsFor(hidden / (packed ? kPackOf<T> : 1), kMaxBackwardThreads);
  const int64_t blocks =
      std::min({(args.tokens + kBackwardRows - 1) / kBackwardRows,
                kBackwardThreads / threads,
                kScratchBytes / static_cast<int64_t>(sizeof(float)) / hidden});
  GW_CHECK(blocks > 0);
  const cudaError_t error =
      Launch(packed ? BackwardKernel<T, kPackOf<T>> : BackwardKernel<T, 1>,
             dim3(static_cast<unsigned>(blocks)),
             dim3(static_cast<unsigned>(threads)), kSharedBytes, stream, args);
  if (error != cudaSuccess) return error;
  return AddColumnSums(args.partials, blocks, hidden, hidden,
                       d_weight.data<float>(), stream);
}

template <typename T>
cudaError_t Backward(const Kernels::RmsNormGrad& args, const Tensor& d_x,
                     const Tensor& d_weight, float* partials,
                     cudaStream_t stream) {
  return Backward<T>({args.d_y.data<T>(), args.x.data<T>(),
                      args.weight.data<T>(), args.rstd.data<float>(),
                      d_x.data<T>(), partials, d_x.dim(0), d_x.dim(1)},
                     d_weight, stream);
}

}  // namespace

void CudaKernels::RmsNormForward(Stream& stream, const Tensor& x,
                                 const Tensor& weight, float eps,
                                 const Tensor& y, const Tensor& rstd) {
  AddRmsNormForward(stream, {x, Tensor(), weight, eps}, Tensor(), y, rstd);
}

void CudaKernels::AddRmsNormForward(Stream& stream, const AddRmsNorm& args,
                                    const Tensor& sum, const Tensor& y,
                                    const Tensor& rstd) {
  if (!stream.ok() || y.num_elements() == 0) return;
  GW_CHECK(args.weight.num_elements() == y.dim(1) && args.x.dim(0) == y.dim(0));
  CudaStream& cuda = Cuda(stream);
  cuda.Check(y.dtype() == DType::kBF16
                 ? Forward<BFloat16>(args, sum, y, rstd, cuda.get())
                 : Forward<float>(args, sum, y, rstd, cuda.get()),
             "RMSNorm");
}

void CudaKernels::RmsNormBackward(Stream& stream, const RmsNormGrad& args,
                                  const Tensor& d_x, const Tensor& d_weight) {
  if (!stream.ok() || d_x.num_elements() == 0) return;
  GW_CHECK(d_weight.num_elements() == d_x.dim(1));
  CudaStream& cuda = Cuda(stream);
  auto* partials = Scratch<float>(0);
  cuda.Check(d_x.dtype() == DType::kBF16
                 ? Backward<BFloat16>(args, d_x, d_weight, partials, cuda.get())
                 : Backward<float>(args, d_x, d_weight, partials, cuda.get()),
             "RMSNorm's gradient");
}

}  // namespace gradwire
