// SPDX-License-Identifier: Apache-2.0
// Kernels that forward every op to others and keep account of it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "benchmarks/kernels/op_work.h"
#include "kernels/kernels.h"

namespace gradwire {

// All calls of one op. Ops of several shapes in a step are told apart by the
// shape: "matmul_forward 960x576" is n x k.
struct OpTotal {
  int64_t calls = 0;
  double seconds = 0;
  Work work;
};

// REQUIRES: the ops of `kernels` have done their work when they return, as
// those of the CPU have.
class ProfilingKernels : public Kernels {
 public:
  explicit ProfilingKernels(std::unique_ptr<Kernels> kernels)
      : kernels_(std::move(kernels)) {}

  // By name, since the last call.
  std::map<std::string, OpTotal> TakeTotals() {
    return std::exchange(totals_, {});
  }

  std::string description() const override { return kernels_->description(); }
  bool RowsHaveTheirOwnBits(DType act) const override {
    return kernels_->RowsHaveTheirOwnBits(act);
  }

  void EmbeddingForward(Stream& stream, const Tensor& tokens,
                        const Tensor& table, const Tensor& out) override;
  void EmbeddingBackward(Stream& stream, const Tensor& tokens,
                         const Tensor& d_out, const Tensor& d_table,
                         const Tensor& squares) override;
  void RmsNormForward(Stream& stream, const Tensor& x, const Tensor& weight,
                      float eps, const Tensor& y, const Tensor& rstd) override;
  void AddRmsNormForward(Stream& stream, const AddRmsNorm& args,
                         const Tensor& sum, const Tensor& y,
                         const Tensor& rstd) override;
  void RmsNormBackward(Stream& stream, const RmsNormGrad& args,
                       const Tensor& d_x, const Tensor& d_weight) override;
  void MatmulForward(Stream& stream, const Tensor& x, const Tensor& w,
                     const Tensor& y, bool accumulate) override;
  void MatmulBackwardInput(Stream& stream, const Tensor& d_y, const Tensor& w,
                           const Tensor& d_x, bool accumulate) override;
  void MatmulBackwardWeight(Stream& stream, const Tensor& d_y, const Tensor& x,
                            const WeightGrad& grad) override;
  void InvalidateWeights(const Tensor& w) override;
  void BiasForward(Stream& stream, const Tensor& bias,
                   const Tensor& y) override;
  void BiasBackward(Stream& stream, const Tensor& d_y,
                    const Tensor& d_bias) override;
  void QkNormRopeForward(Stream& stream, const QkNormRope& args,
                         const Tensor& qkv, const Tensor& out) override;
  void QkNormRopeBackward(Stream& stream, const QkNormRope& args,
                          const QkNormRopeGrad& grad,
                          const Tensor& d_qkv) override;
  int64_t AttentionWorkspaceBytes(const AttentionShape& shape, DType act,
                                  int64_t tokens) const override;
  void AttentionForward(Stream& stream, const Attention& args,
                        const Tensor& out, const Tensor& lse) override;
  void AttentionBackward(Stream& stream, const Attention& args,
                         const AttentionGrad& grad,
                         const Tensor& d_qkv) override;
  void SwiGluForward(Stream& stream, const Tensor& x, const Tensor& y) override;
  void SwiGluBackward(Stream& stream, const Tensor& x, const Tensor& d_y,
                      const Tensor& d_x, const Tensor& y) override;
  int64_t LogprobHeadWorkspaceBytes(DType act, int64_t tokens, int64_t hidden,
                                    int64_t vocab) const override;
  void LogprobHeadForward(Stream& stream, const LogprobHead& args,
                          const LogprobHeadOutput& out,
                          const Tensor& workspace) override;
  int64_t LogprobHeadKeptBytes(DType act, int64_t tokens, int64_t k,
                               int64_t vocab) const override;
  void LogprobHeadBackward(Stream& stream, const LogprobHead& args,
                           const LogprobHeadGrad& grad, const Tensor& d_hidden,
                           const WeightGrad& d_weight) override;
  int64_t LogprobHeadWeightRows(DType act) const override;
  void LogprobHeadBackwardWeight(Stream& stream, const LogprobHead& args,
                                 const LogprobHeadGrad& grad, int64_t begin,
                                 int64_t end,
                                 const WeightGrad& d_weight) override;
  void GatherRows(Stream& stream, const Tensor& x, const Tensor& rows,
                  const Tensor& out) override;
  void ScatterRows(Stream& stream, const Tensor& x, const Tensor& rows,
                   const Tensor& out) override;
  void ScatterAddRows(Stream& stream, const Tensor& x, const Tensor& rows,
                      const Tensor& out) override;
  void Cast(Stream& stream, const Tensor& from, const Tensor& to) override;
  void Add(Stream& stream, const Tensor& x, const Tensor& y) override;
  void SplitMaster(Stream& stream, const Tensor& master, const Tensor& high,
                   const Tensor& low) override;
  void JoinMaster(Stream& stream, const Tensor& high, const Tensor& low,
                  const Tensor& master) override;
  void RowSquares(Stream& stream, const Tensor& x,
                  const Tensor& squares) override;
  double Sum(Stream& stream, const Tensor& x) override;
  void AdamW(Stream& stream, const AdamWParams& params,
             const AdamWTensors& tensors) override;
  void StateDigest(Stream& stream, const AdamWTensors& tensors) override;

 private:
  // Runs `op` and adds its time and work to the totals under `name`.
  template <typename Op>
  auto Measure(const std::string& name, const Work& work, const Op& op);

  const std::unique_ptr<Kernels> kernels_;
  std::map<std::string, OpTotal> totals_;
};

}  // namespace gradwire
