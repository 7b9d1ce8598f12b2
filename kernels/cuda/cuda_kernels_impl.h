// SPDX-License-Identifier: Apache-2.0
// The class behind NewCudaKernels. Each group of ops lives in the file named
// above it: .cu where there are kernels, .cc where cuBLASLt does the work.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/check.h"
#include "device/cuda/cuda_device.h"
#include "kernels/kernels.h"

namespace gradwire {

// Of one op at a time: partial sums, cuBLASLt's workspace. What would need
// more works in turns. An op with products has what is before
// kGemmWorkspaceBytes from the end.
inline constexpr int64_t kScratchBytes = int64_t{64} << 20;

class AttentionTileCache;
class CudaGemm;

class CudaKernels : public Kernels {
 public:
  // `scratch` is of at least kScratchBytes, the last of which are gemm's;
  // `tiles` of AttentionTileCache::kBytes; `warpgroups`: products of warpgroups
  // are there (device/cuda/warpgroup.h).
  CudaKernels(std::string description, bool warpgroups,
              std::unique_ptr<DeviceBuffer> scratch,
              std::unique_ptr<DeviceBuffer> tiles,
              std::unique_ptr<CudaGemm> gemm);
  ~CudaKernels() override;

  // cuda_kernels.cc
  std::string description() const override;
  bool RowsHaveTheirOwnBits(DType act) const override;
  std::string TakeChoices() override;
  absl::Status AdoptChoices(std::string_view choices) override;

  // embedding.cu
  void EmbeddingForward(Stream& stream, const Tensor& tokens,
                        const Tensor& table, const Tensor& out) override;
  void EmbeddingBackward(Stream& stream, const Tensor& tokens,
                         const Tensor& d_out, const Tensor& d_table,
                         const Tensor& squares) override;

  // rmsnorm.cu
  void RmsNormForward(Stream& stream, const Tensor& x, const Tensor& weight,
                      float eps, const Tensor& y, const Tensor& rstd) override;
  void AddRmsNormForward(Stream& stream, const AddRmsNorm& args,
                         const Tensor& sum, const Tensor& y,
                         const Tensor& rstd) override;
  void RmsNormBackward(Stream& stream, const RmsNormGrad& args,
                       const Tensor& d_x, const Tensor& d_weight) override;

  // matmul.cc
  void MatmulForward(Stream& stream, const Tensor& x, const Tensor& w,
                     const Tensor& y, bool accumulate) override;
  void MatmulBackwardInput(Stream& stream, const Tensor& d_y, const Tensor& w,
                           const Tensor& d_x, bool accumulate) override;
  void MatmulBackwardWeight(Stream& stream, const Tensor& d_y, const Tensor& x,
                            const WeightGrad& grad) override;
  void InvalidateWeights(const Tensor& w) override;

  // bias.cu
  void BiasForward(Stream& stream, const Tensor& bias,
                   const Tensor& y) override;
  void BiasBackward(Stream& stream, const Tensor& d_y,
                    const Tensor& d_bias) override;

  // qk_norm_rope.cu
  void QkNormRopeForward(Stream& stream, const QkNormRope& args,
                         const Tensor& qkv, const Tensor& out) override;
  void QkNormRopeBackward(Stream& stream, const QkNormRope& args,
                          const QkNormRopeGrad& grad,
                          const Tensor& d_qkv) override;

  // attention_forward.cu, attention_backward.cu
  int64_t AttentionWorkspaceBytes(const AttentionShape& shape, DType act,
                                  int64_t tokens) const override;
  void AttentionForward(Stream& stream, const Attention& args,
                        const Tensor& out, const Tensor& lse) override;
  void AttentionBackward(Stream& stream, const Attention& args,
                         const AttentionGrad& grad,
                         const Tensor& d_qkv) override;

  // swiglu.cu
  void SwiGluForward(Stream& stream, const Tensor& x, const Tensor& y) override;
  void SwiGluBackward(Stream& stream, const Tensor& x, const Tensor& d_y,
                      const Tensor& d_x, const Tensor& y) override;

  // logprob_head.cc
  int64_t LogprobHeadWorkspaceBytes(DType act, int64_t tokens, int64_t hidden,
                                    int64_t vocab) const override;
  int64_t LogprobHeadKeptBytes(DType act, int64_t tokens, int64_t k,
                               int64_t vocab) const override;
  void LogprobHeadForward(Stream& stream, const LogprobHead& args,
                          const LogprobHeadOutput& out,
                          const Tensor& workspace) override;
  void LogprobHeadBackward(Stream& stream, const LogprobHead& args,
                           const LogprobHeadGrad& grad, const Tensor& d_hidden,
                           const WeightGrad& d_weight) override;
  int64_t LogprobHeadWeightRows(DType act) const override;
  void LogprobHeadBackwardWeight(Stream& stream, const LogprobHead& args,
                                 const LogprobHeadGrad& grad, int64_t begin,
                                 int64_t end,
                                 const WeightGrad& d_weight) override;

  // rows.cu
  void GatherRows(Stream& stream, const Tensor& x, const Tensor& rows,
                  const Tensor& out) override;
  void ScatterRows(Stream& stream, const Tensor& x, const Tensor& rows,
                   const Tensor& out) override;
  void Cast(Stream& stream, const Tensor& from, const Tensor& to) override;
  void Add(Stream& stream, const Tensor& x, const Tensor& y) override;

  // scatter_add_rows.cu
  void ScatterAddRows(Stream& stream, const Tensor& x, const Tensor& rows,
                      const Tensor& out) override;

  // split_master.cu
  void SplitMaster(Stream& stream, const Tensor& master, const Tensor& high,
                   const Tensor& low) override;
  void JoinMaster(Stream& stream, const Tensor& high, const Tensor& low,
                  const Tensor& master) override;

  // squares.cu
  void RowSquares(Stream& stream, const Tensor& x,
                  const Tensor& squares) override;
  double Sum(Stream& stream, const Tensor& x) override;

  // adamw.cu
  void AdamW(Stream& stream, const AdamWParams& params,
             const AdamWTensors& tensors) override;
  void StateDigest(Stream& stream, const AdamWTensors& tensors) override;

 private:
  static CudaStream& Cuda(Stream& stream) {
    return static_cast<CudaStream&>(stream);
  }
  // n elements at the beginning of the scratch memory.
  template <typename T>
  T* Scratch(int64_t n) const {
    GW_CHECK(n * static_cast<int64_t>(sizeof(T)) <= kScratchBytes);
    return static_cast<T*>(scratch_->data());
  }

  const std::string description_;
  const bool warpgroups_;
  const std::unique_ptr<DeviceBuffer> scratch_;
  const std::unique_ptr<DeviceBuffer> tiles_;
  const std::unique_ptr<AttentionTileCache> attention_tiles_;
  const std::unique_ptr<CudaGemm> gemm_;
};

}  // namespace gradwire
