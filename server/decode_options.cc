// SPDX-License-Identifier: Apache-2.0
#include "server/decode_options.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {

absl::StatusOr<LossSpec> DecodeLoss(const v1::LossConfig& config,
                                    int32_t* top_k) {
  LossSpec spec;
  if (!config.loss_fn().empty()) spec.name = config.loss_fn();
  for (const auto& [key, value] : config.config()) {
    if (key == "top_k" && top_k != nullptr && spec.name == "cross_entropy") {
      if (!(value >= 0 && value < 1e6) || value != std::floor(value)) {
        return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                            "TOP_K_OUT_OF_RANGE")
            .With("field", "top_k")
            .With("value", value)
            .With("limit", "a whole number >= 0")
            .Message("top_k must be a whole number, 0 (off) or more.");
      }
      if (*top_k == 0) *top_k = static_cast<int32_t>(value);
    } else {
      spec.config[key] = value;
    }
  }
  GW_RETURN_IF_ERROR(CheckLossSpec(spec));
  return spec;
}

absl::Status CheckTopK(int32_t top_k, const RequestLimits& limits) {
  const int64_t most = std::min<int64_t>(limits.max_top_k, limits.vocab);
  if (top_k >= 0 && top_k <= most) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "TOP_K_OUT_OF_RANGE")
      .With("field", "top_k")
      .With("value", top_k)
      .With("limit", most)
      .Message("top_k must be from 0 (off) to " + std::to_string(most) + ".");
}

absl::StatusOr<OptimParams> DecodeAdamParams(const v1::AdamParams& params) {
  OptimParams out;
  absl::Status status;
  // The step computes in float32: a value must be in range once rounded.
  constexpr double kMax = std::numeric_limits<float>::max();
  const auto read = [&](const char* field, bool present, double value,
                        double limit, double& into) {
    if (!present || !status.ok()) return;
    if (value >= 0 && value <= kMax && static_cast<float>(value) < limit) {
      into = value;
      return;
    }
    status = ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "OPTIM_PARAM_OUT_OF_RANGE")
                 .With("field", field)
                 .With("value", value)
                 .With("limit", limit == 1 ? "[0, 1)" : "[0, inf)")
                 .Message(std::string(field) +
                          " must be finite in float32, at least 0" +
                          (limit == 1 ? " and below 1." : "."));
  };
  constexpr double kAny = std::numeric_limits<double>::infinity();
  read("learning_rate", params.has_learning_rate(), params.learning_rate(),
       kAny, out.learning_rate);
  read("beta1", params.has_beta1(), params.beta1(), 1, out.beta1);
  read("beta2", params.has_beta2(), params.beta2(), 1, out.beta2);
  read("eps", params.has_eps(), params.eps(), kAny, out.eps);
  read("weight_decay", params.has_weight_decay(), params.weight_decay(), kAny,
       out.weight_decay);
  read("grad_clip_norm", params.has_grad_clip_norm(), params.grad_clip_norm(),
       kAny, out.grad_clip_norm);
  GW_RETURN_IF_ERROR(status);
  const auto invalid = [](const char* field, int64_t value, int64_t limit) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                        "OPTIM_PARAM_OUT_OF_RANGE")
        .With("field", field)
        .With("value", value)
        .With("limit", limit)
        .Message(std::string(field) + " has no value " + std::to_string(value) +
                 ".");
  };
  switch (params.normalization()) {
    case v1::GRADIENT_NORMALIZATION_UNSPECIFIED:
    case v1::GRADIENT_NORMALIZATION_NONE:
      break;
    case v1::GRADIENT_NORMALIZATION_NUM_LOSS_TOKENS:
      out.normalization = GradientNormalization::kNumLossTokens;
      break;
    case v1::GRADIENT_NORMALIZATION_NUM_SEQUENCES:
      out.normalization = GradientNormalization::kNumSequences;
      break;
    default:
      return invalid("normalization", params.normalization(),
                     v1::GradientNormalization_MAX);
  }
  switch (params.grad_norm_metrics()) {
    case v1::GRADIENT_NORM_METRICS_UNSPECIFIED:
    case v1::GRADIENT_NORM_METRICS_BASIC:
      break;
    case v1::GRADIENT_NORM_METRICS_OFF:
      out.norm_metrics = GradientNormMetrics::kOff;
      break;
    case v1::GRADIENT_NORM_METRICS_DETAILED:
      out.norm_metrics = GradientNormMetrics::kDetailed;
      break;
    default:
      return invalid("grad_norm_metrics", params.grad_norm_metrics(),
                     v1::GradientNormMetrics_MAX);
  }
  if (params.has_expected_ops()) {
    if (params.expected_ops() < 0) {
      return invalid("expected_ops", params.expected_ops(), 0);
    }
    out.expected_ops = params.expected_ops();
  }
  return out;
}

v1::AdamParams EncodeAdamParams(const OptimParams& params) {
  v1::AdamParams out;
  out.set_learning_rate(params.learning_rate);
  out.set_beta1(params.beta1);
  out.set_beta2(params.beta2);
  out.set_eps(params.eps);
  out.set_weight_decay(params.weight_decay);
  out.set_grad_clip_norm(params.grad_clip_norm);
  switch (params.normalization) {
    case GradientNormalization::kNone:
      out.set_normalization(v1::GRADIENT_NORMALIZATION_NONE);
      break;
    case GradientNormalization::kNumLossTokens:
      out.set_normalization(v1::GRADIENT_NORMALIZATION_NUM_LOSS_TOKENS);
      break;
    case GradientNormalization::kNumSequences:
      out.set_normalization(v1::GRADIENT_NORMALIZATION_NUM_SEQUENCES);
      break;
  }
  switch (params.norm_metrics) {
    case GradientNormMetrics::kOff:
      out.set_grad_norm_metrics(v1::GRADIENT_NORM_METRICS_OFF);
      break;
    case GradientNormMetrics::kBasic:
      out.set_grad_norm_metrics(v1::GRADIENT_NORM_METRICS_BASIC);
      break;
    case GradientNormMetrics::kDetailed:
      out.set_grad_norm_metrics(v1::GRADIENT_NORM_METRICS_DETAILED);
      break;
  }
  if (params.expected_ops >= 0) out.set_expected_ops(params.expected_ops);
  return out;
}

}  // namespace gradwire
