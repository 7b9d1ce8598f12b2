// SPDX-License-Identifier: Apache-2.0
#include "trainer/optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

constexpr std::pair<ParamGroup, const char*> kGroups[] = {
    {ParamGroup::kEmbedding, "grad_norm_embedding"},
    {ParamGroup::kAttention, "grad_norm_attention"},
    {ParamGroup::kMlp, "grad_norm_mlp"},
    {ParamGroup::kNorm, "grad_norm_norm"},
    {ParamGroup::kHead, "grad_norm_head"},
};

int64_t Divisor(const OptimParams& params, const Accumulated& accumulated) {
  int64_t counter = 0;
  if (params.normalization == GradientNormalization::kNumLossTokens) {
    counter = accumulated.loss_tokens;
  } else if (params.normalization == GradientNormalization::kNumSequences) {
    counter = accumulated.sequences;
  }
  return counter > 0 ? counter : 1;
}

}  // namespace

absl::Status Optimizer::CheckBefore(const OptimParams& params) {
  if (params.expected_ops >= 0 && params.expected_ops != accumulated_.ops) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "ACCUMULATION_MISMATCH")
        .With("field", "expected_ops")
        .With("value", params.expected_ops)
        .With("limit", accumulated_.ops)
        .Message("The accumulator holds " + std::to_string(accumulated_.ops) +
                 " operations and " + std::to_string(params.expected_ops) +
                 " were expected; an earlier one has failed. The gradients "
                 "are dropped and the weights unchanged: send the batch "
                 "again.");
  }
  if (accumulated_.tainted) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "GRADIENTS_TAINTED")
        .Server()
        .With("value", accumulated_.ops)
        .Message(
            "An operation failed after it had begun to accumulate. The "
            "gradients are dropped and the weights unchanged: send the batch "
            "again.");
  }
  return absl::OkStatus();
}

double Optimizer::SumOfSquares() {
  if (!accumulated_.written) {
    device_.Zero(stream_, state_.gradient);
    device_.Zero(stream_, state_.squares);
  }
  if (!sharding_.whole) {
    const int64_t n = state_.gradient.num_elements();
    kernels_.RowSquares(stream_, state_.gradient.Reshape({1, n}),
                        state_.squares.Reshape({1, SquareBlocks(n)}));
    return kernels_.Sum(stream_, state_.squares);
  }
  for (const ParamRow& row : table_.rows()) {
    if (row.shape.size() > 1) continue;
    kernels_.RowSquares(
        stream_,
        state_.gradient.Rows(row.offset, row.offset + row.num_elements)
            .Reshape({1, row.num_elements}),
        SquaresOf(row).Reshape({1, row.num_squares}));
  }
  return kernels_.Sum(stream_, state_.squares);
}

double Optimizer::SumOfSquares(ParamGroup group) {
  double sum = 0;
  for (const ParamRow& row : table_.rows()) {
    if (row.group == group) sum += SumOfSquares(row);
  }
  return sum;
}

double Optimizer::SumOfSquares(const ParamRow& row) {
  if (sharding_.whole) return kernels_.Sum(stream_, SquaresOf(row));
  double sum = 0;
  for (const ShardPiece& piece :
       sharding_.layout.Pieces(row.offset, row.offset + row.num_elements)) {
    if (piece.rank != sharding_.rank) continue;
    const int64_t n = piece.size();
    const Tensor squares = state_.squares.Rows(0, SquareBlocks(n));
    kernels_.RowSquares(
        stream_,
        state_.gradient.Rows(piece.offset, piece.offset + n).Reshape({1, n}),
        squares.Reshape({1, SquareBlocks(n)}));
    sum += kernels_.Sum(stream_, squares);
  }
  return sum;
}

AdamWTensors Optimizer::TensorsOf(const ShardPiece& piece) const {
  const auto part = [&](const Tensor& t) {
    return t.is_null() ? t : t.Rows(piece.offset, piece.offset + piece.size());
  };
  return {part(state_.weight), part(state_.low),      part(state_.m),
          part(state_.v),      part(state_.gradient), piece.begin,
          state_.digest};
}

void Optimizer::Update(const AdamWParams& params, const OnUnit& on_unit) {
  digest_.reset();
  device_.Zero(stream_, state_.digest);
  const ShardLayout& layout = sharding_.layout;
  for (int unit = 0; unit < layout.num_units(); ++unit) {
    on_unit.before(unit);
    const ShardPiece piece = layout.Owned(unit, sharding_.rank);
    if (piece.size() > 0) kernels_.AdamW(stream_, params, TensorsOf(piece));
    on_unit.after(unit);
  }
}

absl::StatusOr<DigestSums> Optimizer::FetchDigest() {
  DigestSums sums;
  device_.CopyToHost(stream_, state_.digest, sums.lane);
  GW_RETURN_IF_ERROR(stream_.Finish());
  return sums;
}

absl::StatusOr<DigestSums> Optimizer::StateDigest() {
  if (digest_.has_value()) return *digest_;
  device_.Zero(stream_, state_.digest);
  const ShardLayout& layout = sharding_.layout;
  for (int unit = 0; unit < layout.num_units(); ++unit) {
    const ShardPiece piece = layout.Owned(unit, sharding_.rank);
    if (piece.size() == 0) continue;
    AdamWTensors tensors = TensorsOf(piece);
    // Until the first step they are zeros, and may not be present.
    if (step_ == 0) tensors.m = tensors.v = Tensor();
    kernels_.StateDigest(stream_, tensors);
  }
  GW_ASSIGN_OR_RETURN(digest_, FetchDigest());
  return *digest_;
}

absl::StatusOr<OptimOutcome> Optimizer::Step(const OptimParams& params,
                                             const OnUnit& on_unit) {
  if (absl::Status status = CheckBefore(params); !status.ok()) {
    Clear();
    GW_RETURN_IF_ERROR(stream_.Finish());
    return status;
  }
  OptimOutcome outcome;
  outcome.loss_tokens = accumulated_.loss_tokens;
  outcome.sequences = accumulated_.sequences;
  outcome.skipped = accumulated_.ops == 0;
  if (!outcome.skipped) {
    const double scale =
        1.0 / static_cast<double>(Divisor(params, accumulated_));
    std::vector<double> squares = {SumOfSquares()};
    if (params.norm_metrics == GradientNormMetrics::kDetailed) {
      for (const auto& [group, name] : kGroups) {
        squares.push_back(SumOfSquares(group));
      }
    }
    GW_RETURN_IF_ERROR(stream_.Finish());
    GW_RETURN_IF_ERROR(sharding_.agreement.Sum(squares));
    const double norm = std::sqrt(squares[0]) * scale;
    if (!std::isfinite(norm)) {
      Clear();
      GW_RETURN_IF_ERROR(stream_.Finish());
      return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                          "NONFINITE_GRADIENT")
          .With("field", "grad_norm")
          .With("value", norm)
          .Message(
              "The gradient's norm is not finite. The gradients are dropped "
              "and the weights unchanged: look for huge weights or "
              "advantages in the batch.");
    }
    outcome.grad_norm = norm;
    if (params.grad_clip_norm > 0) {
      outcome.clip_factor =
          std::min(1.0, params.grad_clip_norm / (norm + 1e-6));
    }
    for (size_t i = 1; i < squares.size(); ++i) {
      outcome.metrics[kGroups[i - 1].second] = std::sqrt(squares[i]) * scale;
    }
    AdamWParams adam;
    adam.learning_rate = static_cast<float>(params.learning_rate);
    adam.beta1 = static_cast<float>(params.beta1);
    adam.beta2 = static_cast<float>(params.beta2);
    adam.eps = static_cast<float>(params.eps);
    adam.weight_decay = static_cast<float>(params.weight_decay);
    adam.grad_scale = static_cast<float>(scale * outcome.clip_factor);
    adam.step = step_ + 1;
    Update(adam, on_unit);
    GW_ASSIGN_OR_RETURN(digest_, FetchDigest());
    accumulated_ = Accumulated();
    ++step_;
  }
  outcome.metrics["grad_norm"] = outcome.grad_norm;
  outcome.metrics["clip_factor"] = outcome.clip_factor;
  outcome.metrics["learning_rate"] = params.learning_rate;
  outcome.metrics["optimizer_step"] = static_cast<double>(step_);
  outcome.metrics["loss_tokens"] = static_cast<double>(outcome.loss_tokens);
  outcome.metrics["sequences"] = static_cast<double>(outcome.sequences);
  outcome.metrics["skipped"] = outcome.skipped ? 1 : 0;
  return outcome;
}

void Optimizer::Clear() { accumulated_ = Accumulated(); }

}  // namespace gradwire
