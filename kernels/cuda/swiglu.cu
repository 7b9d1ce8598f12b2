// SPDX-License-Identifier: Apache-2.0
// Bound by memory: three elements move for each element of y, so a thread takes
// as many as one instruction can move, and threads of a warp take neighbours.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"

namespace gradwire {
namespace {

constexpr int kThreads = 256;
// Enough to fill any GPU; a thread takes several packs where there are more.
constexpr int64_t kMaxBlocks = 8192;

// Of one element: sigmoid of the gate.
__device__ inline float Sigmoid(float gate) {
  return 1.0f / (1.0f + expf(-gate));
}

// y [tokens, ffn] = silu(gate) * up, where x [tokens, 2 * ffn] = [gate | up].
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(const T* x, int64_t tokens, int64_t ffn, T* y) {
  const int64_t packs = ffn / kN;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < tokens * packs; i += step) {
    const int64_t t = i / packs;
    const int64_t column = i % packs * kN;
    const T* row = x + t * 2 * ffn + column;
    const Pack<T, kN> gate = LoadPack<kN>(row);
    const Pack<T, kN> up = LoadPack<kN>(row + ffn);
    Pack<T, kN> out;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const auto g = static_cast<float>(gate.element[j]);
      out.element[j] = T(g * Sigmoid(g) * static_cast<float>(up.element[j]));
    }
    StorePack(y + t * ffn + column, out);
  }
}

// d_x may be x: a thread reads what it writes over before that.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    BackwardKernel(const T* x, const T* d_y, int64_t tokens, int64_t ffn,
                   T* d_x, T* y) {
  const int64_t packs = ffn / kN;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < tokens * packs; i += step) {
    const int64_t t = i / packs;
    const int64_t column = i % packs * kN;
    const int64_t at = t * 2 * ffn + column;
    const Pack<T, kN> gate = LoadPack<kN>(x + at);
    const Pack<T, kN> up = LoadPack<kN>(x + at + ffn);
    const Pack<T, kN> d_out = LoadPack<kN>(d_y + t * ffn + column);
    Pack<T, kN> d_gate, d_up, out;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const auto g = static_cast<float>(gate.element[j]);
      const auto u = static_cast<float>(up.element[j]);
      const auto d = static_cast<float>(d_out.element[j]);
      const float s = Sigmoid(g);
      d_gate.element[j] = T(d * u * s * (1.0f + g * (1.0f - s)));
      d_up.element[j] = T(d * g * s);
      out.element[j] = T(g * s * u);
    }
    StorePack(d_x + at, d_gate);
    StorePack(d_x + at + ffn, d_up);
    if (y != nullptr) StorePack(y + t * ffn + column, out);
  }
}

unsigned BlocksFor(int64_t threads) {
  return static_cast<unsigned>(
      std::min((threads + kThreads - 1) / kThreads, kMaxBlocks));
}

template <typename T, int kN>
cudaError_t Forward(const Tensor& x, const Tensor& y, cudaStream_t stream) {
  const int64_t tokens = y.dim(0), ffn = y.dim(1);
  return Launch(ForwardKernel<T, kN>, dim3(BlocksFor(tokens * ffn / kN)),
                dim3(kThreads), 0, stream, static_cast<const T*>(x.data<T>()),
                tokens, ffn, y.data<T>());
}

template <typename T>
cudaError_t Forward(const Tensor& x, const Tensor& y, cudaStream_t stream) {
  return ArePacked<T>(y.dim(1), x.raw(), y.raw())
             ? Forward<T, kPackOf<T>>(x, y, stream)
             : Forward<T, 1>(x, y, stream);
}

template <typename T, int kN>
cudaError_t Backward(const Tensor& x, const Tensor& d_y, const Tensor& d_x,
                     const Tensor& y, cudaStream_t stream) {
  const int64_t tokens = d_y.dim(0), ffn = d_y.dim(1);
  return Launch(BackwardKernel<T, kN>, dim3(BlocksFor(tokens * ffn / kN)),
                dim3(kThreads), 0, stream, static_cast<const T*>(x.data<T>()),
                static_cast<const T*>(d_y.data<T>()), tokens, ffn,
                d_x.data<T>(), y.is_null() ? nullptr : y.data<T>());
}

template <typename T>
cudaError_t Backward(const Tensor& x, const Tensor& d_y, const Tensor& d_x,
                     const Tensor& y, cudaStream_t stream) {
  return ArePacked<T>(d_y.dim(1), x.raw(), d_y.raw(), d_x.raw(), y.raw())
             ? Backward<T, kPackOf<T>>(x, d_y, d_x, y, stream)
             : Backward<T, 1>(x, d_y, d_x, y, stream);
}

}  // namespace

void CudaKernels::SwiGluForward(Stream& stream, const Tensor& x,
                                const Tensor& y) {
  if (!stream.ok() || y.num_elements() == 0) return;
  GW_CHECK(x.dim(1) == 2 * y.dim(1) && y.dim(0) == x.dim(0));
  CudaStream& cuda = Cuda(stream);
  cuda.Check(x.dtype() == DType::kBF16 ? Forward<BFloat16>(x, y, cuda.get())
                                       : Forward<float>(x, y, cuda.get()),
             "SwiGLU");
}

void CudaKernels::SwiGluBackward(Stream& stream, const Tensor& x,
                                 const Tensor& d_y, const Tensor& d_x,
                                 const Tensor& y) {
  if (!stream.ok() || d_y.num_elements() == 0) return;
  GW_CHECK(x.dim(1) == 2 * d_y.dim(1) && d_x.dim(1) == x.dim(1));
  CudaStream& cuda = Cuda(stream);
  cuda.Check(x.dtype() == DType::kBF16
                 ? Backward<BFloat16>(x, d_y, d_x, y, cuda.get())
                 : Backward<float>(x, d_y, d_x, y, cuda.get()),
             "SwiGLU's gradient");
}

}  // namespace gradwire
