// SPDX-License-Identifier: Apache-2.0
#include "server/decode_datum.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "server/decode_tensor.h"

namespace gradwire {
namespace {

absl::StatusOr<std::vector<int32_t>> DecodeTokens(const v1::Datum& datum,
                                                  int64_t datum_index,
                                                  const RequestLimits& limits) {
  const DatumField where = {datum_index, "model_input"};
  int64_t bytes = 0;
  for (const v1::ModelInputChunk& chunk : datum.chunks()) {
    if (!chunk.has_text()) {
      return ErrorBuilder(absl::StatusCode::kUnimplemented,
                          "MODALITY_UNSUPPORTED")
          .With("datum_index", datum_index)
          .With("field", "chunks")
          .With("value", chunk.has_image() ? "image" : "unset")
          .With("limit", "text")
          .Message("This server takes text chunks only.");
    }
    const auto size = static_cast<int64_t>(chunk.text().tokens().size());
    if (size % 4 != 0) {
      return where.Error("SHAPE_MISMATCH")
          .With("value", size)
          .With("limit", 4)
          .Message("tokens must be int32, 4 bytes each.");
    }
    bytes += size;
  }
  const int64_t n = bytes / 4;
  if (n < 1) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", n)
        .With("limit", 1)
        .Message(where.Name() + " has no token; it needs at least one.");
  }
  if (n > limits.max_context) {
    return where.Error("SEQUENCE_TOO_LONG")
        .With("value", n)
        .With("limit", limits.max_context)
        .Message("Datum " + std::to_string(datum_index) + " has " +
                 std::to_string(n) + " tokens and the job takes " +
                 std::to_string(limits.max_context) +
                 ". Truncate it, or create the job with a longer "
                 "max_context_length.");
  }
  std::vector<int32_t> tokens(n);
  char* out = reinterpret_cast<char*>(tokens.data());
  for (const v1::ModelInputChunk& chunk : datum.chunks()) {
    const std::string& part = chunk.text().tokens();
    out = std::copy(part.begin(), part.end(), out);
  }
  for (int64_t i = 0; i < n; ++i) {
    if (tokens[i] >= 0 && tokens[i] < limits.vocab) continue;
    return where.Error("TOKEN_OUT_OF_RANGE")
        .With("position", i)
        .With("value", tokens[i])
        .With("limit", limits.vocab)
        .Message("Token ids must be from 0 to below the vocabulary's size.");
  }
  return tokens;
}

absl::Status DecodeTargets(const v1::TensorData& tensor,
                           const DatumField& where, const LossInfo& loss,
                           const RequestLimits& limits, TrainDatum& out) {
  if (tensor.dtype() != v1::DATA_TYPE_INT64 &&
      tensor.dtype() != v1::DATA_TYPE_INT32) {
    return where.Error("DTYPE_MISMATCH")
        .With("value", TypeName(tensor.dtype()))
        .With("limit", "DATA_TYPE_INT64")
        .Message(where.Name() + " must be int64.");
  }
  const auto n = static_cast<int64_t>(out.tokens.size());
  GW_ASSIGN_OR_RETURN(TargetShape shape, ShapeOf(tensor, n, where));
  if (shape.k > 1 && !loss.many_targets) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", shape.k)
        .With("limit", 1)
        .Message(loss.name + " takes one target a position.");
  }
  absl::Status range;
  const auto put = [&](int64_t element, int64_t i) {
    const int64_t target = IntegerAt(tensor, i);
    if (range.ok() && (target < 0 || target >= limits.vocab)) {
      range = where.Error("TOKEN_OUT_OF_RANGE")
                  .With("position", element / shape.k)
                  .With("value", target)
                  .With("limit", limits.vocab)
                  .Message(
                      "Targets must be from 0 to below the vocabulary's "
                      "size.");
    }
    out.targets[element] = static_cast<int32_t>(target);
  };
  out.k = shape.k;
  if (IsSparse(tensor)) {
    out.targets.assign(shape.n * shape.k, 0);
    GW_RETURN_IF_ERROR(ReadSparse(tensor, shape, where, put));
  } else {
    GW_RETURN_IF_ERROR(CheckDense(tensor, shape, where));
    out.targets.resize(shape.n * shape.k);
    for (int64_t i = 0; i < shape.n * shape.k; ++i) put(i, i);
  }
  return range;
}

// Whether an input may be [N] beside targets [N, K], must be, or must not.
enum class PerTarget { kRequired, kAllowed, kForbidden };

absl::Status DecodeFloats(const v1::TensorData& tensor, const DatumField& where,
                          const TrainDatum& datum, PerTarget per_target,
                          std::vector<float>& out) {
  if (tensor.dtype() != v1::DATA_TYPE_FLOAT32) {
    return where.Error("DTYPE_MISMATCH")
        .With("value", TypeName(tensor.dtype()))
        .With("limit", "DATA_TYPE_FLOAT32")
        .Message(where.Name() + " must be float32.");
  }
  const auto n = static_cast<int64_t>(datum.tokens.size());
  GW_ASSIGN_OR_RETURN(TargetShape shape, ShapeOf(tensor, n, where));
  const bool fits = shape.k == datum.k
                        ? per_target != PerTarget::kForbidden || datum.k == 1
                        : shape.k == 1 && per_target != PerTarget::kRequired;
  if (!fits) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", shape.k)
        .With("limit", per_target == PerTarget::kForbidden ? 1 : datum.k)
        .Message(where.Name() + " has " + std::to_string(shape.k) +
                 " values a position and its target_tokens " +
                 std::to_string(datum.k) + ".");
  }
  absl::Status finite;
  const auto put = [&](int64_t element, int64_t i) {
    const float value = ReadAt<float>(tensor.data(), i);
    if (finite.ok() && !std::isfinite(value)) {
      finite = where.Error("NONFINITE_INPUT")
                   .With("position", element / shape.k)
                   .With("value", value)
                   .With("limit", "finite")
                   .Message(where.Name() +
                            " must be finite; send 0 where a position is not "
                            "to count.");
    }
    out[element] = value;
  };
  if (IsSparse(tensor)) {
    if (where.field != "weights") {
      return where.Error("CSR_INVALID")
          .With("value", where.field)
          .With("limit", "target_tokens, weights")
          .Message("Only target_tokens and weights may be sparse.");
    }
    out.assign(shape.n * shape.k, 0.0f);
    GW_RETURN_IF_ERROR(ReadSparse(tensor, shape, where, put));
  } else {
    GW_RETURN_IF_ERROR(CheckDense(tensor, shape, where));
    out.resize(shape.n * shape.k);
    for (int64_t i = 0; i < shape.n * shape.k; ++i) put(i, i);
  }
  return finite;
}

// The bounds that hold where a datum has none of its own.
struct Bounds {
  double low = 0;
  double high = std::numeric_limits<double>::infinity();
};

absl::Status CheckThresholds(const TrainDatum& datum, int64_t datum_index,
                             const Bounds& config) {
  const bool has_low = !datum.clip_low.empty();
  const bool has_high = !datum.clip_high.empty();
  if (!has_low && !has_high) return absl::OkStatus();
  for (size_t i = 0; i < datum.tokens.size(); ++i) {
    const double low = has_low ? datum.clip_low[i] : config.low;
    const double high = has_high ? datum.clip_high[i] : config.high;
    // In float32, as the loss computes: its 1.2 is not above the config's.
    const bool ordered = static_cast<float>(low) <= static_cast<float>(high);
    if (low >= 0 && high >= 0 && ordered) continue;
    // Name what the datum brought, and of two the one that breaks a rule alone.
    const bool blame_low = has_low && (low < 0 || !has_high || high >= 0);
    const double limit = (blame_low ? low : high) < 0 ? 0
                         : blame_low                  ? high
                                                      : low;
    const DatumField where = {
        datum_index, blame_low ? "clip_low_threshold" : "clip_high_threshold"};
    return where.Error("LOSS_CONFIG_OUT_OF_RANGE")
        .With("position", static_cast<int64_t>(i))
        .With("value", blame_low ? low : high)
        .With("limit", limit)
        .Message(where.Name() +
                 ": clip thresholds are ratios with 0 <= low <= high, where "
                 "the loss's config stands in for one that is not given.");
  }
  return absl::OkStatus();
}

bool Lists(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

}  // namespace

absl::StatusOr<TrainDatum> DecodeDatum(const v1::Datum& datum,
                                       int64_t datum_index,
                                       const LossInfo& loss,
                                       const RequestLimits& limits) {
  TrainDatum out;
  GW_ASSIGN_OR_RETURN(out.tokens, DecodeTokens(datum, datum_index, limits));
  const auto& inputs = datum.loss_fn_inputs();
  // The first by name, since a protobuf map has no order.
  const std::string* unknown = nullptr;
  for (const auto& [name, tensor] : inputs) {
    const bool known = name == "target_tokens" || Lists(loss.required, name) ||
                       Lists(loss.optional, name);
    if (!known && (unknown == nullptr || name < *unknown)) unknown = &name;
  }
  if (unknown != nullptr) {
    std::string listed = "target_tokens";
    for (const std::string& name : loss.required) listed += ", " + name;
    for (const std::string& name : loss.optional) listed += ", " + name;
    return DatumField{datum_index, unknown->substr(0, 64)}
        .Error("UNKNOWN_LOSS_INPUT")
        .With("value", loss.name)
        .With("limit", listed)
        .Message(loss.name + " does not read " + unknown->substr(0, 64) +
                 "; leave it out, or choose the loss that does.");
  }
  std::vector<std::string> required = loss.required;
  required.insert(required.begin(), "target_tokens");
  for (const std::string& name : required) {
    if (inputs.count(name) != 0) continue;
    return DatumField{datum_index, name}
        .Error("MISSING_LOSS_INPUT")
        .With("value", "absent")
        .With("limit", "required by " + loss.name)
        .Message(loss.name + " needs " + name + " in every datum.");
  }
  GW_RETURN_IF_ERROR(DecodeTargets(inputs.at("target_tokens"),
                                   {datum_index, "target_tokens"}, loss, limits,
                                   out));
  const struct {
    const char* name;
    PerTarget per_target;
    std::vector<float>* values;
  } floats[] = {
      {"weights", PerTarget::kRequired, &out.weights},
      {"advantages", PerTarget::kAllowed, &out.advantages},
      {"logprobs", PerTarget::kAllowed, &out.logprobs},
      {"clip_low_threshold", PerTarget::kForbidden, &out.clip_low},
      {"clip_high_threshold", PerTarget::kForbidden, &out.clip_high},
      {"sequence_ratio_mask", PerTarget::kForbidden, &out.sequence_ratio_mask},
  };
  for (const auto& field : floats) {
    auto it = inputs.find(field.name);
    if (it == inputs.end()) continue;
    GW_RETURN_IF_ERROR(DecodeFloats(it->second, {datum_index, field.name}, out,
                                    field.per_target, *field.values));
  }
  GW_RETURN_IF_ERROR(CheckThresholds(out, datum_index, Bounds()));
  return out;
}

absl::StatusOr<TrainDatum> DecodeDatum(const v1::Datum& datum,
                                       int64_t datum_index,
                                       const LossSpec& loss,
                                       const RequestLimits& limits) {
  const LossInfo* info = FindLoss(loss.name);
  GW_CHECK(info != nullptr);
  GW_ASSIGN_OR_RETURN(TrainDatum out,
                      DecodeDatum(datum, datum_index, *info, limits));
  const auto setting = [&](const char* name, double absent) {
    const auto given = loss.config.find(name);
    if (given != loss.config.end()) return given->second;
    for (const LossKey& key : info->config) {
      if (key.name == name) return key.default_value.value_or(absent);
    }
    return absent;
  };
  Bounds bounds;
  bounds.low = setting("clip_low_threshold", bounds.low);
  bounds.high = setting("clip_high_threshold", bounds.high);
  GW_RETURN_IF_ERROR(CheckThresholds(out, datum_index, bounds));
  return out;
}

absl::StatusOr<std::vector<float>> DecodeGradient(const v1::GradientItem& item,
                                                  int64_t n, int64_t k) {
  TrainDatum datum;
  datum.tokens.resize(n);
  datum.k = k;
  std::vector<float> out;
  const DatumField where = {item.datum_index(), "d_logprobs"};
  if (IsSparse(item.d_logprobs())) {
    return where.Error("CSR_INVALID")
        .With("value", "sparse")
        .With("limit", "dense")
        .Message("d_logprobs must be dense.");
  }
  GW_RETURN_IF_ERROR(
      DecodeFloats(item.d_logprobs(), where, datum, PerTarget::kRequired, out));
  return out;
}

}  // namespace gradwire
