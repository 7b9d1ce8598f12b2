// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/profile/profiling_kernels.h"

#include "benchmarks/kernels/timing.h"

namespace gradwire {
namespace {

// "matmul_forward 960x576", of a weight w [n, k].
std::string WithShape(const char* op, const Tensor& w) {
  return std::string(op) + " " + std::to_string(w.dim(0)) + "x" +
         std::to_string(w.dim(1));
}

}  // namespace

// The op's own time ends before its account is made.
template <typename Op>
auto ProfilingKernels::Measure(const std::string& name, const Work& work,
                               const Op& op) {
  struct Account {
    OpTotal& total;
    const Work& work;
    const double start = NowSeconds();
    ~Account() {
      total.seconds += NowSeconds() - start;
      total.work.flops += work.flops;
      total.work.bytes += work.bytes;
      ++total.calls;
    }
  };
  const Account account{totals_[name], work};
  return op();
}

void ProfilingKernels::EmbeddingForward(Stream& stream, const Tensor& tokens,
                                        const Tensor& table,
                                        const Tensor& out) {
  Measure("embedding_forward", PassWork(out, out),
          [&] { kernels_->EmbeddingForward(stream, tokens, table, out); });
}

void ProfilingKernels::EmbeddingBackward(Stream& stream, const Tensor& tokens,
                                         const Tensor& d_out,
                                         const Tensor& d_table,
                                         const Tensor& squares) {
  Measure("embedding_backward", EmbeddingGradWork(d_out), [&] {
    kernels_->EmbeddingBackward(stream, tokens, d_out, d_table, squares);
  });
}

void ProfilingKernels::RmsNormForward(Stream& stream, const Tensor& x,
                                      const Tensor& weight, float eps,
                                      const Tensor& y, const Tensor& rstd) {
  Measure("rmsnorm_forward", PassWork(x, y),
          [&] { kernels_->RmsNormForward(stream, x, weight, eps, y, rstd); });
}

void ProfilingKernels::AddRmsNormForward(Stream& stream, const AddRmsNorm& args,
                                         const Tensor& sum, const Tensor& y,
                                         const Tensor& rstd) {
  Measure("add_rmsnorm_forward", PassWork(args.x, args.delta, sum, y),
          [&] { kernels_->AddRmsNormForward(stream, args, sum, y, rstd); });
}

void ProfilingKernels::RmsNormBackward(Stream& stream, const RmsNormGrad& args,
                                       const Tensor& d_x,
                                       const Tensor& d_weight) {
  Measure("rmsnorm_backward", PassWork(args.d_y, args.x, d_x, d_x),
          [&] { kernels_->RmsNormBackward(stream, args, d_x, d_weight); });
}

void ProfilingKernels::MatmulForward(Stream& stream, const Tensor& x,
                                     const Tensor& w, const Tensor& y,
                                     bool accumulate) {
  Measure(WithShape("matmul_forward", w), MatmulWork(x, w, y, accumulate),
          [&] { kernels_->MatmulForward(stream, x, w, y, accumulate); });
}

void ProfilingKernels::MatmulBackwardInput(Stream& stream, const Tensor& d_y,
                                           const Tensor& w, const Tensor& d_x,
                                           bool accumulate) {
  Measure(WithShape("matmul_backward_input", w),
          MatmulWork(d_y, w, d_x, accumulate), [&] {
            kernels_->MatmulBackwardInput(stream, d_y, w, d_x, accumulate);
          });
}

void ProfilingKernels::MatmulBackwardWeight(Stream& stream, const Tensor& d_y,
                                            const Tensor& x,
                                            const WeightGrad& grad) {
  Measure(WithShape("matmul_backward_weight", grad.d_w),
          MatmulWeightWork(d_y, x, grad),
          [&] { kernels_->MatmulBackwardWeight(stream, d_y, x, grad); });
}

void ProfilingKernels::InvalidateWeights(const Tensor& w) {
  kernels_->InvalidateWeights(w);
}

void ProfilingKernels::BiasForward(Stream& stream, const Tensor& bias,
                                   const Tensor& y) {
  Measure("bias_forward", PassWork(y, y),
          [&] { kernels_->BiasForward(stream, bias, y); });
}

void ProfilingKernels::BiasBackward(Stream& stream, const Tensor& d_y,
                                    const Tensor& d_bias) {
  Measure("bias_backward", PassWork(d_y),
          [&] { kernels_->BiasBackward(stream, d_y, d_bias); });
}

void ProfilingKernels::QkNormRopeForward(Stream& stream, const QkNormRope& args,
                                         const Tensor& qkv, const Tensor& out) {
  Measure("qk_norm_rope_forward", PassWork(out, out),
          [&] { kernels_->QkNormRopeForward(stream, args, qkv, out); });
}

void ProfilingKernels::QkNormRopeBackward(Stream& stream,
                                          const QkNormRope& args,
                                          const QkNormRopeGrad& grad,
                                          const Tensor& d_qkv) {
  // With QK-norm the forward's input is read as well.
  const Work work = args.q_weight.is_null()
                        ? PassWork(grad.d_out, d_qkv)
                        : PassWork(grad.d_out, grad.qkv, d_qkv);
  Measure("qk_norm_rope_backward", work,
          [&] { kernels_->QkNormRopeBackward(stream, args, grad, d_qkv); });
}

int64_t ProfilingKernels::AttentionWorkspaceBytes(const AttentionShape& shape,
                                                  DType act,
                                                  int64_t tokens) const {
  return kernels_->AttentionWorkspaceBytes(shape, act, tokens);
}

void ProfilingKernels::AttentionForward(Stream& stream, const Attention& args,
                                        const Tensor& out, const Tensor& lse) {
  Measure("attention_forward", AttentionWork(args, out),
          [&] { kernels_->AttentionForward(stream, args, out, lse); });
}

void ProfilingKernels::AttentionBackward(Stream& stream, const Attention& args,
                                         const AttentionGrad& grad,
                                         const Tensor& d_qkv) {
  Measure("attention_backward", AttentionGradWork(args, grad.out),
          [&] { kernels_->AttentionBackward(stream, args, grad, d_qkv); });
}

void ProfilingKernels::SwiGluForward(Stream& stream, const Tensor& x,
                                     const Tensor& y) {
  Measure("swiglu_forward", PassWork(x, y),
          [&] { kernels_->SwiGluForward(stream, x, y); });
}

void ProfilingKernels::SwiGluBackward(Stream& stream, const Tensor& x,
                                      const Tensor& d_y, const Tensor& d_x,
                                      const Tensor& y) {
  Measure("swiglu_backward", PassWork(x, d_y, d_x, y),
          [&] { kernels_->SwiGluBackward(stream, x, d_y, d_x, y); });
}

int64_t ProfilingKernels::LogprobHeadWorkspaceBytes(DType act, int64_t tokens,
                                                    int64_t hidden,
                                                    int64_t vocab) const {
  return kernels_->LogprobHeadWorkspaceBytes(act, tokens, hidden, vocab);
}

void ProfilingKernels::LogprobHeadForward(Stream& stream,
                                          const LogprobHead& args,
                                          const LogprobHeadOutput& out,
                                          const Tensor& workspace) {
  Measure("logprob_head_forward", LogprobHeadWork(args),
          [&] { kernels_->LogprobHeadForward(stream, args, out, workspace); });
}

int64_t ProfilingKernels::LogprobHeadKeptBytes(DType act, int64_t tokens,
                                               int64_t k, int64_t vocab) const {
  return kernels_->LogprobHeadKeptBytes(act, tokens, k, vocab);
}

void ProfilingKernels::LogprobHeadBackward(Stream& stream,
                                           const LogprobHead& args,
                                           const LogprobHeadGrad& grad,
                                           const Tensor& d_hidden,
                                           const WeightGrad& d_weight) {
  const Work work = LogprobHeadGradWork(args, grad, d_weight);
  Measure("logprob_head_backward", work, [&] {
    kernels_->LogprobHeadBackward(stream, args, grad, d_hidden, d_weight);
  });
}

int64_t ProfilingKernels::LogprobHeadWeightRows(DType act) const {
  return kernels_->LogprobHeadWeightRows(act);
}

void ProfilingKernels::LogprobHeadBackwardWeight(Stream& stream,
                                                 const LogprobHead& args,
                                                 const LogprobHeadGrad& grad,
                                                 int64_t begin, int64_t end,
                                                 const WeightGrad& d_weight) {
  LogprobHead some = args;
  some.weight = args.weight.Rows(begin, end);
  // A forward's product.
  Measure("logprob_head_backward_weight", LogprobHeadWork(some), [&] {
    kernels_->LogprobHeadBackwardWeight(stream, args, grad, begin, end,
                                        d_weight);
  });
}

void ProfilingKernels::GatherRows(Stream& stream, const Tensor& x,
                                  const Tensor& rows, const Tensor& out) {
  Measure("gather_rows", PassWork(out, out),
          [&] { kernels_->GatherRows(stream, x, rows, out); });
}

void ProfilingKernels::ScatterRows(Stream& stream, const Tensor& x,
                                   const Tensor& rows, const Tensor& out) {
  Measure("scatter_rows", PassWork(out, out),
          [&] { kernels_->ScatterRows(stream, x, rows, out); });
}

void ProfilingKernels::ScatterAddRows(Stream& stream, const Tensor& x,
                                      const Tensor& rows, const Tensor& out) {
  Measure("scatter_add_rows", PassWork(x, out),
          [&] { kernels_->ScatterAddRows(stream, x, rows, out); });
}

void ProfilingKernels::Cast(Stream& stream, const Tensor& from,
                            const Tensor& to) {
  Measure("cast", PassWork(from, to),
          [&] { kernels_->Cast(stream, from, to); });
}

void ProfilingKernels::Add(Stream& stream, const Tensor& x, const Tensor& y) {
  Measure("add", PassWork(x, y, y), [&] { kernels_->Add(stream, x, y); });
}

void ProfilingKernels::SplitMaster(Stream& stream, const Tensor& master,
                                   const Tensor& high, const Tensor& low) {
  Measure("split_master", PassWork(master, high, low),
          [&] { kernels_->SplitMaster(stream, master, high, low); });
}

void ProfilingKernels::JoinMaster(Stream& stream, const Tensor& high,
                                  const Tensor& low, const Tensor& master) {
  Measure("join_master", PassWork(high, low, master),
          [&] { kernels_->JoinMaster(stream, high, low, master); });
}

void ProfilingKernels::RowSquares(Stream& stream, const Tensor& x,
                                  const Tensor& squares) {
  Measure("row_squares", PassWork(x, squares),
          [&] { kernels_->RowSquares(stream, x, squares); });
}

double ProfilingKernels::Sum(Stream& stream, const Tensor& x) {
  return Measure("sum", PassWork(x), [&] { return kernels_->Sum(stream, x); });
}

void ProfilingKernels::AdamW(Stream& stream, const AdamWParams& params,
                             const AdamWTensors& tensors) {
  Measure("adamw", AdamWWork(tensors),
          [&] { kernels_->AdamW(stream, params, tensors); });
}
void ProfilingKernels::StateDigest(Stream& stream,
                                   const AdamWTensors& tensors) {
  Measure("state_digest", StateDigestWork(tensors),
          [&] { kernels_->StateDigest(stream, tensors); });
}

}  // namespace gradwire
