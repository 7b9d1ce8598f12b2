// SPDX-License-Identifier: Apache-2.0
// The three products of a linear layer. All read the tensors as they lie.
#include "base/check.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/gemm.h"
#include "kernels/squares.h"

namespace gradwire {

void CudaKernels::MatmulForward(Stream& stream, const Tensor& x,
                                const Tensor& w, const Tensor& y,
                                bool accumulate) {
  if (!stream.ok()) return;
  const int64_t m = x.dim(0), k = x.dim(1), n = w.dim(0);
  GW_CHECK(w.dim(1) == k && y.dim(0) == m && y.dim(1) == n);
  GW_CHECK(x.dtype() == w.dtype() && x.dtype() == y.dtype());
  gemm_->Run(Cuda(stream),
             {.m = m,
              .n = n,
              .k = k,
              .b_transposed = true,
              .a_row = k,
              .b_row = k,
              .c_row = n,
              .ab = x.dtype(),
              .c = y.dtype(),
              .accumulate = accumulate},
             x.raw(), w.raw(), y.raw());
}

void CudaKernels::MatmulBackwardInput(Stream& stream, const Tensor& d_y,
                                      const Tensor& w, const Tensor& d_x,
                                      bool accumulate) {
  if (!stream.ok()) return;
  const int64_t m = d_y.dim(0), n = d_y.dim(1), k = w.dim(1);
  GW_CHECK(w.dim(0) == n && d_x.dim(0) == m && d_x.dim(1) == k);
  GW_CHECK(d_y.dtype() == w.dtype() && d_y.dtype() == d_x.dtype());
  gemm_->Run(Cuda(stream),
             {.m = m,
              .n = k,
              .k = n,
              .a_row = n,
              .b_row = k,
              .c_row = k,
              .ab = d_y.dtype(),
              .c = d_x.dtype(),
              .accumulate = accumulate},
             d_y.raw(), w.raw(), d_x.raw());
}

void CudaKernels::MatmulBackwardWeight(Stream& stream, const Tensor& d_y,
                                       const Tensor& x,
                                       const WeightGrad& grad) {
  if (!stream.ok()) return;
  const int64_t m = d_y.dim(0), n = d_y.dim(1), k = x.dim(1);
  GW_CHECK(x.dim(0) == m && grad.d_w.dim(0) == n && grad.d_w.dim(1) == k);
  GW_CHECK(d_y.dtype() == x.dtype() && grad.d_w.dtype() == DType::kF32);
  gemm_->Run(Cuda(stream),
             {.m = n,
              .n = k,
              .k = m,
              .a_transposed = true,
              .a_row = n,
              .b_row = k,
              .c_row = k,
              .ab = d_y.dtype(),
              .c = DType::kF32,
              .accumulate = grad.accumulate},
             d_y.raw(), x.raw(), grad.d_w.raw());
  // No epilogue of cuBLASLt squares what it writes.
  if (!grad.squares.is_null()) RowSquares(stream, grad.d_w, grad.squares);
}

// The products read weights as they lie; nothing is kept.
void CudaKernels::InvalidateWeights(const Tensor&) {}

}  // namespace gradwire
