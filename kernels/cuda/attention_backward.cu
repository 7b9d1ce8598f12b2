// SPDX-License-Identifier: Apache-2.0
// The gradient of attention in three passes: what each query row needs, d_q by
// tiles of queries, d_k and d_v by tiles of keys. Two passes that both make the
// scores do 7 products where one would do 5, but each block owns what it
// writes: no atomics, one order of sums.
#include <cstdint>
#include <type_traits>

#include "device/cuda/kernel.h"
#include "kernels/cuda/attention_gradient.h"
#include "kernels/cuda/attention_plain.h"
#include "kernels/cuda/attention_warpgroup.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {
namespace {

// Of a row of d_out and out; four rows a warp.
constexpr int kLanesPerRow = 8;
constexpr int kThreads = 256;

// stats [heads, tokens] = {lse log2(e), d_out . out}; bound by memory.
//   out, d_out [tokens, heads, head_dim]; lse [tokens, heads]
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    StatsKernel(AttentionGradArgs<T> args, const T* out, const float* lse,
                AttentionRowStats* stats) {
  const int64_t rows = args.tokens * args.heads;
  const int64_t row =
      (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) /
      kLanesPerRow;
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerRow;
  float sum = 0.0f;
  if (row < rows) {
    for (int c = lane * kN; c < args.head_dim; c += kLanesPerRow * kN) {
      const Pack<T, kN> a = LoadPack<kN>(out + row * args.head_dim + c);
      const Pack<T, kN> b = LoadPack<kN>(args.d_out + row * args.head_dim + c);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        sum = fmaf(static_cast<float>(a.element[i]),
                   static_cast<float>(b.element[i]), sum);
      }
    }
  }
#pragma unroll
  for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  }
  if (row < rows && lane == 0) {
    stats[row % args.heads * args.tokens + row / args.heads] = {
        lse[row] * kLog2E, sum};
  }
}

template <typename T>
cudaError_t MakeStats(const AttentionGradArgs<T>& args,
                      const Kernels::AttentionGrad& grad,
                      AttentionRowStats* stats, cudaStream_t stream) {
  const int64_t threads = args.tokens * args.heads * kLanesPerRow;
  const bool packed =
      ArePacked<T>(args.head_dim, grad.out.raw(), grad.d_out.raw());
  return Launch(
      packed ? StatsKernel<T, kPackOf<T>> : StatsKernel<T, 1>,
      dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)),
      dim3(kThreads), 0, stream, args,
      static_cast<const T*>(grad.out.data<T>()),
      static_cast<const float*>(grad.lse.data<float>()), stats);
}

template <typename T>
cudaError_t Backward(const Kernels::Attention& args,
                     const Kernels::AttentionGrad& grad, const Tensor& d_qkv,
                     bool warpgroups, AttentionTileCache& cache,
                     cudaStream_t stream) {
  const AttentionWorkspace workspace(args.workspace, args.shape.heads,
                                     args.qkv.dim(0));
  const AttentionCall call = {args.layout, workspace, cache, stream};
  AttentionGradArgs<T> on_device;
  static_cast<AttentionArgs<T>&>(on_device) = ArgsOf<T>(args);
  on_device.d_out = grad.d_out.data<T>();
  on_device.stats = workspace.stats;
  on_device.d_qkv = d_qkv.data<T>();
  const cudaError_t error = MakeStats(on_device, grad, workspace.stats, stream);
  if (error != cudaSuccess) return error;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (AttentionOnTensorCores(
            args.shape, {args.qkv.raw(), grad.d_out.raw(), d_qkv.raw()})) {
      const bool wide = warpgroups && AttentionOnWarpgroups(args.shape);
      const cudaError_t failed =
          wide ? AttentionQueryGradientOnWarpgroups(call, on_device)
               : AttentionQueryGradient(call, on_device);
      if (failed != cudaSuccess) return failed;
      return wide ? AttentionKeyGradientOnWarpgroups(call, on_device)
                  : AttentionKeyGradient(call, on_device);
    }
  }
  return PlainAttentionBackward(call, on_device);
}

}  // namespace

void CudaKernels::AttentionBackward(Stream& stream, const Attention& args,
                                    const AttentionGrad& grad,
                                    const Tensor& d_qkv) {
  if (!stream.ok() || args.qkv.num_elements() == 0) return;
  CheckAttention(args);
  GW_CHECK(grad.d_out.dim(0) == args.qkv.dim(0) &&
           d_qkv.dim(1) == args.qkv.dim(1));
  CudaStream& cuda = Cuda(stream);
  cuda.Check(args.qkv.dtype() == DType::kBF16
                 ? Backward<BFloat16>(args, grad, d_qkv, warpgroups_,
                                      *attention_tiles_, cuda.get())
                 : Backward<float>(args, grad, d_qkv, false, *attention_tiles_,
                                   cuda.get()),
             "attention's gradient");
}

}  // namespace gradwire
