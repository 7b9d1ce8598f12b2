// SPDX-License-Identifier: Apache-2.0
// Bound by memory. A block takes a token, and in it a few lanes of a warp a
// head: each holds packs of the two halves that are rotated into each other,
// so what goes through the norm and the rotation stays in its registers, and
// the token's angles with it for all heads. Sums over a head are shuffles.
//
// The weights' gradients are summed over a block's tokens, also in registers,
// then over its warps, then over blocks.
#include <algorithm>
#include <cstdint>

#include "device/cuda/kernel.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/reduce.h"
#include "kernels/cuda/rotated_head.h"

namespace gradwire {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
// As many as a GPU holds at a time: six a multiprocessor, and of the backward,
// whose threads take more registers, four.
constexpr int kBlocks = 6, kBackwardBlocks = 4;
constexpr int64_t kMaxBlocks = int64_t{132} * kBlocks;
constexpr int64_t kMaxBackwardBlocks = int64_t{132} * kBackwardBlocks;
// Elements that are moved at once. More would leave registers for few blocks.
constexpr int kPack = 4;
// Packs of half a head that a lane holds where one is not enough, and what
// they bound. Such heads are wide, or not whole packs: no model's that we know.
constexpr int kManyHeld = 16;
constexpr int64_t kMaxHeadDim = 2 * kWarpSize * kManyHeld;

template <typename T>
struct Rotation {
  const T* in;   // qkv, or in the backward d_out
  const T* qkv;  // in the backward
  T* out;
  const T* q_weight;  // or null
  const T* k_weight;  // or null
  const float* cos;
  const float* sin;
  const int32_t* positions;
  float* partials;  // [blocks, 2 * head_dim] = of the weights, or null
  int64_t tokens;
  int heads, kv_heads, head_dim;
  float eps;
  int lanes;  // for a head: a power of two
};

template <typename T, int kN>
__device__ void CopyV(const Rotation<T>& args, const T* from, T* to) {
  const int begin = (args.heads + args.kv_heads) * args.head_dim;
  const int end = begin + args.kv_heads * args.head_dim;
  if (from == to) return;
  for (int i = begin + static_cast<int>(threadIdx.x) * kN; i < end;
       i += kThreads * kN) {
    StorePack(to + i, LoadPack<kN>(from + i));
  }
}

// Calls visit(head, whether it is one) for `heads` heads, each by its lanes; a
// warp's lanes make as many calls as each other.
template <typename Visit>
__device__ inline void ForHeads(int heads, int lanes, const Visit& visit) {
  const int of_warp = kWarpSize / lanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int within = static_cast<int>(threadIdx.x) % kWarpSize / lanes;
#pragma unroll 1
  for (int first = warp * of_warp; first < heads; first += kWarps * of_warp) {
    const bool there = first + within < heads;
    visit(there ? first + within : first, there);
  }
}

template <typename T, int kN, int kHeld>
__global__ void __launch_bounds__(kThreads, kHeld == 1 ? kBlocks : 1)
    ForwardKernel(Rotation<T> args) {
  using Pair = HeldPair<kN, kHeld>;
  const int dim = args.head_dim;
  const int64_t width = (args.heads + int64_t{2} * args.kv_heads) * dim;
  const Head<T, kN, kHeld> head(static_cast<int>(threadIdx.x) % args.lanes,
                                args.lanes, dim);
  for (int64_t t = blockIdx.x; t < args.tokens; t += gridDim.x) {
    const int64_t angle = int64_t{args.positions[t]} * (dim / 2);
    const auto cos = head.LoadFloats(args.cos + angle);
    const auto sin = head.LoadFloats(args.sin + angle);
    const auto rotate = [&](int first, int heads, const T* weights) {
      ForHeads(heads, args.lanes, [&](int h, bool there) {
        const int64_t at = t * width + int64_t{first + h} * dim;
        Pair x = {};
        if (there) x = head.Load(args.in + at);
        if (weights != nullptr) {
          head.Norm(head.Load(weights), head.Rstd(x, args.eps), &x);
        }
        head.Rotate(cos, sin, 1.0f, &x);
        if (there) head.Store(x, args.out + at);
      });
    };
    rotate(0, args.heads, args.q_weight);
    rotate(args.heads, args.kv_heads, args.k_weight);
    CopyV<T, kN>(args, args.in + t * width, args.out + t * width);
  }
}

template <typename T, int kN, int kHeld>
__global__ void __launch_bounds__(kThreads, kHeld == 1 ? kBackwardBlocks : 1)
    BackwardKernel(Rotation<T> args) {
  using Pair = HeldPair<kN, kHeld>;
  const int dim = args.head_dim;
  const int64_t width = (args.heads + int64_t{2} * args.kv_heads) * dim;
  const Head<T, kN, kHeld> head(static_cast<int>(threadIdx.x) % args.lanes,
                                args.lanes, dim);
  Pair d_q_weight = {}, d_k_weight = {};
  for (int64_t t = blockIdx.x; t < args.tokens; t += gridDim.x) {
    const int64_t angle = int64_t{args.positions[t]} * (dim / 2);
    const auto cos = head.LoadFloats(args.cos + angle);
    const auto sin = head.LoadFloats(args.sin + angle);
    const auto rotate = [&](int first, int heads, const T* weights,
                            Pair* d_weight) {
      ForHeads(heads, args.lanes, [&](int h, bool there) {
        const int64_t at = t * width + int64_t{first + h} * dim;
        // Zeros add nothing to the sums.
        Pair grad = {};
        if (there) grad = head.Load(args.in + at);
        head.Rotate(cos, sin, -1.0f, &grad);
        if (weights != nullptr) {
          const Pair x = head.Load(args.qkv + at);
          head.NormBackward(x, head.Load(weights), head.Rstd(x, args.eps),
                            &grad, d_weight);
        }
        if (there) head.Store(grad, args.out + at);
      });
    };
    rotate(0, args.heads, args.q_weight, &d_q_weight);
    rotate(args.heads, args.kv_heads, args.k_weight, &d_k_weight);
    CopyV<T, kN>(args, args.in + t * width, args.out + t * width);
  }
  if (args.partials == nullptr) return;

  // Over the heads of a warp, which are a few lanes each.
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const auto over_heads = [&](float value) {
    for (int lanes = kWarpSize / 2; lanes >= args.lanes; lanes /= 2) {
      value += __shfl_xor_sync(kAllLanes, value, lanes);
    }
    return value;
  };
  // A loop over their addresses would keep them out of registers.
  const auto sum_over_heads = [&](Pair& sums) {
#pragma unroll
    for (int p = 0; p < kHeld; ++p) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        sums.a.value[p][j] = over_heads(sums.a.value[p][j]);
        sums.b.value[p][j] = over_heads(sums.b.value[p][j]);
      }
    }
  };
  sum_over_heads(d_q_weight);
  sum_over_heads(d_k_weight);
  SharedMemory memory;
  const SharedArray<float> of_warps = memory.Take<float>(kWarps * 2 * dim);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (lane < args.lanes) {
    head.ForPacks([&](int p, int column) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int at = warp * 2 * dim + column + j;
        of_warps[at] = d_q_weight.a.value[p][j];
        of_warps[at + dim / 2] = d_q_weight.b.value[p][j];
        of_warps[at + dim] = d_k_weight.a.value[p][j];
        of_warps[at + dim + dim / 2] = d_k_weight.b.value[p][j];
      }
    });
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * dim; i += kThreads) {
    float sum = of_warps[i];
    for (int w = 1; w < kWarps; ++w) sum += of_warps[w * 2 * dim + i];
    args.partials[blockIdx.x * int64_t{2} * dim + i] = sum;
  }
}

template <typename T>
Rotation<T> RotationOf(const QkNormRope& args, const Tensor& in,
                       const Tensor& out) {
  const AttentionShape& s = args.shape;
  Rotation<T> rotation = {};
  rotation.in = in.data<T>();
  rotation.out = out.data<T>();
  rotation.q_weight = args.q_weight.data<T>();
  rotation.k_weight = args.k_weight.data<T>();
  rotation.cos = args.cos.data<float>();
  rotation.sin = args.sin.data<float>();
  rotation.positions = args.positions.data<int32_t>();
  rotation.tokens = in.dim(0);
  rotation.heads = static_cast<int>(s.heads);
  rotation.kv_heads = static_cast<int>(s.kv_heads);
  rotation.head_dim = static_cast<int>(s.head_dim);
  rotation.eps = args.eps;
  return rotation;
}

// Whether halves are whole packs, and few enough that a lane holds one.
template <typename T>
bool HoldsOnePack(const Rotation<T>& args) {
  const int half = args.head_dim / 2;
  return half <= kWarpSize * kPack &&
         ArePacked<T>(half, args.in, args.qkv, args.out, args.q_weight,
                      args.k_weight, args.cos, args.sin);
}

// The fewest lanes that hold half a head.
int LanesFor(int packs) {
  int lanes = 1;
  while (lanes < packs && lanes < kWarpSize) lanes *= 2;
  return lanes;
}

unsigned BlocksFor(int64_t tokens, int64_t most) {
  return static_cast<unsigned>(std::min(tokens, most));
}

template <typename T>
cudaError_t Forward(Rotation<T> args, cudaStream_t stream) {
  const bool one = HoldsOnePack(args);
  args.lanes = LanesFor(args.head_dim / 2 / (one ? kPack : 1));
  return Launch(
      one ? ForwardKernel<T, kPack, 1> : ForwardKernel<T, 1, kManyHeld>,
      dim3(BlocksFor(args.tokens, kMaxBlocks)), dim3(kThreads), 0, stream,
      args);
}

template <typename T>
cudaError_t Backward(Rotation<T> args, const Kernels::QkNormRopeGrad& grad,
                     float* partials, cudaStream_t stream) {
  args.qkv = grad.qkv.data<T>();
  if (!grad.d_q_weight.is_null() || !grad.d_k_weight.is_null()) {
    args.partials = partials;
  }
  const bool one = HoldsOnePack(args);
  args.lanes = LanesFor(args.head_dim / 2 / (one ? kPack : 1));
  const unsigned blocks = BlocksFor(args.tokens, kMaxBackwardBlocks);
  const int64_t dim = args.head_dim;
  const std::size_t shared_bytes =
      args.partials == nullptr
          ? 0
          : static_cast<std::size_t>(kWarps * 2 * dim) * sizeof(float);
  cudaError_t error = Launch(
      one ? BackwardKernel<T, kPack, 1> : BackwardKernel<T, 1, kManyHeld>,
      dim3(blocks), dim3(kThreads), shared_bytes, stream, args);
  const float* sums = partials;
  for (const Tensor& d_weight : {grad.d_q_weight, grad.d_k_weight}) {
    if (error == cudaSuccess && !d_weight.is_null()) {
      error = AddColumnSums(sums, blocks, 2 * dim, dim, d_weight.data<float>(),
                            stream);
    }
    sums += dim;
  }
  return error;
}

}  // namespace

void CudaKernels::QkNormRopeForward(Stream& stream, const QkNormRope& args,
                                    const Tensor& qkv, const Tensor& out) {
  if (!stream.ok() || qkv.num_elements() == 0) return;
  const int64_t dim = args.shape.head_dim;
  GW_CHECK(qkv.dim(1) == args.shape.QkvWidth() && out.dim(1) == qkv.dim(1));
  GW_CHECK(dim % 2 == 0 && dim <= kMaxHeadDim);
  CudaStream& cuda = Cuda(stream);
  cuda.Check(qkv.dtype() == DType::kBF16
                 ? Forward(RotationOf<BFloat16>(args, qkv, out), cuda.get())
                 : Forward(RotationOf<float>(args, qkv, out), cuda.get()),
             "QK-norm and RoPE");
}

void CudaKernels::QkNormRopeBackward(Stream& stream, const QkNormRope& args,
                                     const QkNormRopeGrad& grad,
                                     const Tensor& d_qkv) {
  if (!stream.ok() || d_qkv.num_elements() == 0) return;
  const int64_t dim = args.shape.head_dim;
  GW_CHECK(d_qkv.dim(1) == args.shape.QkvWidth());
  GW_CHECK(dim % 2 == 0 && dim <= kMaxHeadDim);
  CudaStream& cuda = Cuda(stream);
  auto* partials = Scratch<float>(kMaxBackwardBlocks * 2 * dim);
  cuda.Check(d_qkv.dtype() == DType::kBF16
                 ? Backward(RotationOf<BFloat16>(args, grad.d_out, d_qkv), grad,
                            partials, cuda.get())
                 : Backward(RotationOf<float>(args, grad.d_out, d_qkv), grad,
                            partials, cuda.get()),
             "the gradient of QK-norm and RoPE");
}

}  // namespace gradwire
