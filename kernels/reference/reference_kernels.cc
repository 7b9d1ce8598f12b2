// SPDX-License-Identifier: Apache-2.0
#include "kernels/reference/reference_kernels.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>

#include "kernels/reference/linear.h"
#include "kernels/reference/number.h"
#include "kernels/reference/pointwise.h"
#include "kernels/reference/softmax_ops.h"

namespace gradwire {
namespace {

namespace ref = reference;

void CopyRow(const Tensor& from, int64_t i, const Tensor& to, int64_t j) {
  const size_t bytes =
      static_cast<size_t>(from.dim(1) * DTypeBytes(from.dtype()));
  std::memcpy(to.Rows(j, j + 1).raw(), from.Rows(i, i + 1).raw(), bytes);
}

class ReferenceKernels : public Kernels {
 public:
  std::string description() const override { return "reference"; }
  bool RowsHaveTheirOwnBits(DType) const override { return true; }

  void EmbeddingForward(Stream& stream, const Tensor& tokens,
                        const Tensor& table, const Tensor& out) override {
    GatherRows(stream, table, tokens, out);
  }
  void EmbeddingBackward(Stream& stream, const Tensor& tokens,
                         const Tensor& d_out, const Tensor& d_table,
                         const Tensor& squares) override {
    if (!stream.ok()) return;
    Store(ref::EmbeddingBackward<double>(tokens, d_out, d_table), d_table);
    for (int64_t t = 0; !squares.is_null() && t < tokens.dim(0); ++t) {
      const int32_t id = tokens.data<int32_t>()[t];
      RowSquares(stream, d_table.Rows(id, id + 1), squares.Rows(id, id + 1));
    }
  }

  void RmsNormForward(Stream& stream, const Tensor& x, const Tensor& weight,
                      float eps, const Tensor& y, const Tensor& rstd) override {
    if (!stream.ok()) return;
    const auto result = ref::RmsNormForward<double>(x, weight, eps);
    Store(result.y, y);
    Store(result.rstd, rstd);
  }
  void AddRmsNormForward(Stream& stream, const AddRmsNorm& args,
                         const Tensor& sum, const Tensor& y,
                         const Tensor& rstd) override {
    if (!stream.ok()) return;
    std::vector<double> sums;
    for (int64_t i = 0; i < args.x.num_elements(); ++i) {
      sums.push_back(
          ref::AddRounded(args.x.dtype(), At(args.x, i), At(args.delta, i)));
    }
    Store(sums, sum);
    RmsNormForward(stream, sum, args.weight, args.eps, y, rstd);
  }
  void RmsNormBackward(Stream& stream, const RmsNormGrad& args,
                       const Tensor& d_x, const Tensor& d_weight) override {
    if (!stream.ok()) return;
    const auto result = ref::RmsNormBackward<double>(args, d_x, d_weight);
    Store(result.d_x, d_x);
    Store(result.d_weight, d_weight);
  }

  void MatmulForward(Stream& stream, const Tensor& x, const Tensor& w,
                     const Tensor& y, bool accumulate) override {
    if (!stream.ok()) return;
    Store(ref::MatmulForward<double>(x, w, y, accumulate), y);
  }
  void MatmulBackwardInput(Stream& stream, const Tensor& d_y, const Tensor& w,
                           const Tensor& d_x, bool accumulate) override {
    if (!stream.ok()) return;
    Store(ref::MatmulBackwardInput<double>(d_y, w, d_x, accumulate), d_x);
  }
  void MatmulBackwardWeight(Stream& stream, const Tensor& d_y, const Tensor& x,
                            const WeightGrad& grad) override {
    if (!stream.ok()) return;
    Store(ref::MatmulBackwardWeight<double>(d_y, x, grad), grad.d_w);
    if (!grad.squares.is_null()) RowSquares(stream, grad.d_w, grad.squares);
  }
  void InvalidateWeights(const Tensor&) override {}

  void BiasForward(Stream& stream, const Tensor& bias,
                   const Tensor& y) override {
    if (!stream.ok()) return;
    Store(ref::BiasForward<double>(bias, y), y);
  }
  void BiasBackward(Stream& stream, const Tensor& d_y,
                    const Tensor& d_bias) override {
    if (!stream.ok()) return;
    Store(ref::BiasBackward<double>(d_y, d_bias), d_bias);
  }

  void QkNormRopeForward(Stream& stream, const QkNormRope& args,
                         const Tensor& qkv, const Tensor& out) override {
    if (!stream.ok()) return;
    Store(ref::QkNormRopeForward<double>(args, qkv), out);
  }
  void QkNormRopeBackward(Stream& stream, const QkNormRope& args,
                          const QkNormRopeGrad& grad,
                          const Tensor& d_qkv) override {
    if (!stream.ok()) return;
    const auto result = ref::QkNormRopeBackward<double>(args, grad);
    Store(result.d_qkv, d_qkv);
    if (!grad.d_q_weight.is_null()) Store(result.d_q_weight, grad.d_q_weight);
    if (!grad.d_k_weight.is_null()) Store(result.d_k_weight, grad.d_k_weight);
  }

  int64_t AttentionWorkspaceBytes(const AttentionShape&, DType,
                                  int64_t) const override {
    return 0;
  }
  void AttentionForward(Stream& stream, const Attention& args,
                        const Tensor& out, const Tensor& lse) override {
    if (!stream.ok()) return;
    const auto result = ref::AttentionForward<double>(args);
    Store(result.out, out);
    Store(result.lse, lse);
  }
  void AttentionBackward(Stream& stream, const Attention& args,
                         const AttentionGrad& grad,
                         const Tensor& d_qkv) override {
    if (!stream.ok()) return;
    Store(ref::AttentionBackward<double>(args, grad), d_qkv);
  }

  void SwiGluForward(Stream& stream, const Tensor& x,
                     const Tensor& y) override {
    if (!stream.ok()) return;
    Store(ref::SwiGluForward<double>(x), y);
  }
  void SwiGluBackward(Stream& stream, const Tensor& x, const Tensor& d_y,
                      const Tensor& d_x, const Tensor& y) override {
    if (!stream.ok()) return;
    if (!y.is_null()) Store(ref::SwiGluForward<double>(x), y);
    Store(ref::SwiGluBackward<double>(x, d_y), d_x);
  }

  int64_t LogprobHeadWorkspaceBytes(DType, int64_t, int64_t,
                                    int64_t) const override {
    return 0;
  }
  int64_t LogprobHeadKeptBytes(DType, int64_t, int64_t,
                               int64_t) const override {
    return 0;
  }
  void LogprobHeadForward(Stream& stream, const LogprobHead& args,
                          const LogprobHeadOutput& out,
                          const Tensor&) override {
    if (!stream.ok()) return;
    const int64_t top_k =
        out.top_k_logprobs.is_null() ? 0 : out.top_k_logprobs.dim(1);
    const auto result = ref::LogprobHeadForward<double>(args, top_k);
    Store(result.logprobs, out.logprobs);
    Store(result.lse, out.lse);
    Store(result.top_k_logprobs, out.top_k_logprobs);
    std::copy(result.top_k_indices.begin(), result.top_k_indices.end(),
              out.top_k_indices.data<int32_t>());
  }
  void LogprobHeadBackward(Stream& stream, const LogprobHead& args,
                           const LogprobHeadGrad& grad, const Tensor& d_hidden,
                           const WeightGrad& d_weight) override {
    if (!stream.ok()) return;
    const auto result = ref::LogprobHeadBackward<double>(args, grad, d_weight);
    Store(result.d_hidden, d_hidden);
    Store(result.d_weight, d_weight.d_w);
    if (d_weight.squares.is_null()) return;
    RowSquares(stream, d_weight.d_w, d_weight.squares);
  }
  // Nothing is kept.
  int64_t LogprobHeadWeightRows(DType) const override { return 0; }
  void LogprobHeadBackwardWeight(Stream&, const LogprobHead&,
                                 const LogprobHeadGrad&, int64_t, int64_t,
                                 const WeightGrad&) override {
    GW_CHECK(false);
  }

  void GatherRows(Stream& stream, const Tensor& x, const Tensor& rows,
                  const Tensor& out) override {
    if (!stream.ok()) return;
    for (int64_t i = 0; i < rows.dim(0); ++i) {
      CopyRow(x, rows.data<int32_t>()[i], out, i);
    }
  }
  void ScatterRows(Stream& stream, const Tensor& x, const Tensor& rows,
                   const Tensor& out) override {
    if (!stream.ok()) return;
    std::memset(out.raw(), 0, static_cast<size_t>(out.bytes()));
    for (int64_t i = 0; i < rows.dim(0); ++i) {
      CopyRow(x, i, out, rows.data<int32_t>()[i]);
    }
  }
  void ScatterAddRows(Stream& stream, const Tensor& x, const Tensor& rows,
                      const Tensor& out) override {
    if (!stream.ok()) return;
    Store(ref::ScatterAddRows<double>(x, rows, out.dim(0)), out);
  }
  void Cast(Stream& stream, const Tensor& from, const Tensor& to) override {
    if (!stream.ok()) return;
    std::vector<double> values;
    for (int64_t i = 0; i < from.num_elements(); ++i) {
      values.push_back(At(from, i));
    }
    Store(values, to);
  }
  void Add(Stream& stream, const Tensor& x, const Tensor& y) override {
    if (!stream.ok()) return;
    Store(ref::Add<double>(x, y), y);
  }

  void RowSquares(Stream& stream, const Tensor& x,
                  const Tensor& squares) override {
    if (stream.ok()) Store(ref::RowSquares(x), squares);
  }
  double Sum(Stream& stream, const Tensor& x) override {
    double sum = 0;
    for (int64_t i = 0; stream.ok() && i < x.num_elements(); ++i) {
      sum += At(x, i);
    }
    return sum;
  }
  void SplitMaster(Stream& stream, const Tensor& master, const Tensor& high,
                   const Tensor& low) override {
    if (stream.ok()) Split(master.data<float>(), high, low);
  }
  void JoinMaster(Stream& stream, const Tensor& high, const Tensor& low,
                  const Tensor& master) override {
    for (int64_t i = 0; stream.ok() && i < master.num_elements(); ++i) {
      master.data<float>()[i] =
          JoinHalves({high.data<BFloat16>()[i], low.data<int16_t>()[i]});
    }
  }
  void AdamW(Stream& stream, const AdamWParams& params,
             const AdamWTensors& tensors) override {
    if (!stream.ok()) return;
    const auto result = ref::AdamW<double>(params, tensors);
    if (tensors.low.is_null()) {
      Store(result.master, tensors.weight);
    } else {
      const std::vector<float> master(result.master.begin(),
                                      result.master.end());
      Split(master.data(), tensors.weight, tensors.low);
    }
    const RoundingKey key = RoundingKeyOf(params.seed, params.step);
    for (const auto& [moments, to, shift] :
         {std::tuple(&result.m, tensors.m, 0), {&result.v, tensors.v, 16}}) {
      if (to.dtype() == DType::kF32) {
        Store(*moments, to);
        continue;
      }
      for (int64_t i = 0; i < to.num_elements(); ++i) {
        to.data<BFloat16>()[i] = StochasticBFloat16(
            static_cast<float>((*moments)[static_cast<size_t>(i)]),
            (RoundingBits(key, tensors.first + i) >> shift) & 0xffffu);
      }
    }
    if (!tensors.digest.is_null()) StateDigest(stream, tensors);
  }
  void StateDigest(Stream& stream, const AdamWTensors& tensors) override {
    if (!stream.ok()) return;
    const DigestSums sums = ref::StateDigest(tensors);
    for (int i = 0; i < 2; ++i) {
      int64_t& to = tensors.digest.data<int64_t>()[i];
      to = static_cast<int64_t>(static_cast<uint64_t>(to) + sums.lane[i]);
    }
  }

 private:
  static void Split(const float* master, const Tensor& high,
                    const Tensor& low) {
    for (int64_t i = 0; i < high.num_elements(); ++i) {
      const Halves halves = SplitHalves(master[i]);
      high.data<BFloat16>()[i] = halves.high;
      if (!low.is_null()) low.data<int16_t>()[i] = halves.low;
    }
  }
};

}  // namespace

std::unique_ptr<Kernels> NewReferenceKernels() {
  return std::make_unique<ReferenceKernels>();
}

}  // namespace gradwire
