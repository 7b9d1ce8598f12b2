// SPDX-License-Identifier: Apache-2.0
// The class behind NewCpuKernels. Each group of ops lives in the .cc file named
// above it.
#pragma once

#include <memory>
#include <string>

#include "device/cpu_device.h"
#include "kernels/cpu/scratch.h"
#include "kernels/kernels.h"

namespace gradwire {

class Gemm;

class CpuKernels : public Kernels {
 public:
  CpuKernels();
  ~CpuKernels() override;

  // cpu_kernels.cc
  std::string description() const override;
  bool RowsHaveTheirOwnBits(DType act) const override;

  // embedding.cc
  void EmbeddingForward(Stream& stream, const Tensor& tokens,
                        const Tensor& table, const Tensor& out) override;
  void EmbeddingBackward(Stream& stream, const Tensor& tokens,
                         const Tensor& d_out, const Tensor& d_table,
                         const Tensor& squares) override;

  // rmsnorm.cc
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

  // bias.cc
  void BiasForward(Stream& stream, const Tensor& bias,
                   const Tensor& y) override;
  void BiasBackward(Stream& stream, const Tensor& d_y,
                    const Tensor& d_bias) override;

  // qk_norm_rope.cc
  void QkNormRopeForward(Stream& stream, const QkNormRope& args,
                         const Tensor& qkv, const Tensor& out) override;
  void QkNormRopeBackward(Stream& stream, const QkNormRope& args,
                          const QkNormRopeGrad& grad,
                          const Tensor& d_qkv) override;

  // attention.cc
  int64_t AttentionWorkspaceBytes(const AttentionShape& shape, DType act,
                                  int64_t tokens) const override;
  void AttentionForward(Stream& stream, const Attention& args,
                        const Tensor& out, const Tensor& lse) override;
  void AttentionBackward(Stream& stream, const Attention& args,
                         const AttentionGrad& grad,
                         const Tensor& d_qkv) override;

  // swiglu.cc
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

  // rows.cc
  void GatherRows(Stream& stream, const Tensor& x, const Tensor& rows,
                  const Tensor& out) override;
  void ScatterRows(Stream& stream, const Tensor& x, const Tensor& rows,
                   const Tensor& out) override;
  void ScatterAddRows(Stream& stream, const Tensor& x, const Tensor& rows,
                      const Tensor& out) override;
  void Cast(Stream& stream, const Tensor& from, const Tensor& to) override;
  void Add(Stream& stream, const Tensor& x, const Tensor& y) override;

  // split_master.cc
  void SplitMaster(Stream& stream, const Tensor& master, const Tensor& high,
                   const Tensor& low) override;
  void JoinMaster(Stream& stream, const Tensor& high, const Tensor& low,
                  const Tensor& master) override;

  // squares.cc
  void RowSquares(Stream& stream, const Tensor& x,
                  const Tensor& squares) override;
  double Sum(Stream& stream, const Tensor& x) override;

  // adamw.cc
  void AdamW(Stream& stream, const AdamWParams& params,
             const AdamWTensors& tensors) override;
  void StateDigest(Stream& stream, const AdamWTensors& tensors) override;

 private:
  static ThreadPool& Pool(Stream& stream) {
    return static_cast<CpuStream&>(stream).pool();
  }

  // Matmul primitives by shape, built on first use (gemm.h).
  const std::unique_ptr<Gemm> gemm_;
  // Tiles of the op that runs.
  Scratch scratch_;
};

}  // namespace gradwire
