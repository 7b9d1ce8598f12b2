// SPDX-License-Identifier: Apache-2.0
#include "server/validate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

constexpr int64_t kMaxTargetsPerPosition = 64;

// Makes errors about one datum.
struct Where {
  int64_t datum_index = 0;
  std::string field;
  ErrorBuilder Error(const std::string& reason) const {
    ErrorBuilder error(absl::StatusCode::kInvalidArgument, reason);
    error.With("datum_index", datum_index).With("field", field);
    return error;
  }
  std::string Name() const {
    return field + " of datum " + std::to_string(datum_index);
  }
};

int64_t ElementBytes(v1::DataType dtype) {
  switch (dtype) {
    case v1::DATA_TYPE_FLOAT32:
    case v1::DATA_TYPE_INT32:
      return 4;
    case v1::DATA_TYPE_INT64:
      return 8;
    default:
      return 0;
  }
}

// For errors; what this version does not know has a number only.
std::string TypeName(v1::DataType dtype) {
  return v1::DataType_IsValid(dtype) ? v1::DataType_Name(dtype)
                                     : std::to_string(dtype);
}

template <typename T>
T ReadAt(const std::string& bytes, int64_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

// Element i as a 64-bit integer. REQUIRES: an integer dtype.
int64_t IntegerAt(const v1::TensorData& tensor, int64_t i) {
  return tensor.dtype() == v1::DATA_TYPE_INT32
             ? ReadAt<int32_t>(tensor.data(), i)
             : ReadAt<int64_t>(tensor.data(), i);
}

struct Shape {
  int64_t n = 0;
  int64_t k = 1;
};

// The shape [n] or [n, k] of a tensor for n positions. Does not look at data.
absl::StatusOr<Shape> ShapeOf(const v1::TensorData& tensor, int64_t n,
                              const Where& where) {
  if (tensor.shape_size() < 1 || tensor.shape_size() > 2) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", tensor.shape_size())
        .With("limit", 2)
        .Message(where.Name() + " must have the shape [N] or [N, K].");
  }
  if (tensor.shape(0) != n) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", tensor.shape(0))
        .With("limit", n)
        .Message(where.Name() + " has " + std::to_string(tensor.shape(0)) +
                 " entries and its model_input " + std::to_string(n) +
                 " tokens. Both must be as long: the server shifts nothing.");
  }
  const int64_t k = tensor.shape_size() == 2 ? tensor.shape(1) : 1;
  if (k < 1 || k > kMaxTargetsPerPosition) {
    return where.Error("SHAPE_MISMATCH")
        .With("value", k)
        .With("limit", kMaxTargetsPerPosition)
        .Message(where.Name() + " must have 1 to " +
                 std::to_string(kMaxTargetsPerPosition) +
                 " targets a position.");
  }
  return Shape{n, k};
}

bool IsSparse(const v1::TensorData& tensor) {
  return !tensor.csr_columns().empty() || !tensor.csr_row_offsets().empty();
}

// That the dense bytes are as many as the shape says.
absl::Status CheckDense(const v1::TensorData& tensor, const Shape& shape,
                        const Where& where) {
  const int64_t bytes = shape.n * shape.k * ElementBytes(tensor.dtype());
  if (static_cast<int64_t>(tensor.data().size()) == bytes) {
    return absl::OkStatus();
  }
  return where.Error("SHAPE_MISMATCH")
      .With("value", static_cast<int64_t>(tensor.data().size()))
      .With("limit", bytes)
      .Message(where.Name() + " has " + std::to_string(tensor.data().size()) +
               " bytes and its shape asks for " + std::to_string(bytes) + ".");
}

// Calls put(element of [n, k], stored index) for every stored value, after the
// structure has been checked.
template <typename Put>
absl::Status ReadSparse(const v1::TensorData& tensor, const Shape& shape,
                        const Where& where, Put put) {
  const auto invalid = [&](const std::string& what, int64_t value,
                           int64_t limit) {
    return where.Error("CSR_INVALID")
        .With("value", value)
        .With("limit", limit)
        .Message(where.Name() + ": " + what + ".");
  };
  if (tensor.shape_size() != 2) {
    return invalid("the sparse form needs the shape [N, K]",
                   tensor.shape_size(), 2);
  }
  const auto offset_bytes =
      static_cast<int64_t>(tensor.csr_row_offsets().size());
  if (offset_bytes != (shape.n + 1) * 8) {
    return invalid("csr_row_offsets must hold N + 1 int64", offset_bytes,
                   (shape.n + 1) * 8);
  }
  const int64_t element = ElementBytes(tensor.dtype());
  const auto data_bytes = static_cast<int64_t>(tensor.data().size());
  const int64_t stored = data_bytes / element;
  if (data_bytes % element != 0 ||
      static_cast<int64_t>(tensor.csr_columns().size()) != stored * 4) {
    return invalid("csr_columns must hold one int32 for each value",
                   static_cast<int64_t>(tensor.csr_columns().size()),
                   stored * 4);
  }
  if (ReadAt<int64_t>(tensor.csr_row_offsets(), 0) != 0) {
    return invalid("the first row offset must be 0",
                   ReadAt<int64_t>(tensor.csr_row_offsets(), 0), 0);
  }
  const auto invalid_row = [&](int64_t row, const std::string& what,
                               int64_t value, int64_t limit) {
    return WithErrorMetadata(invalid(what, value, limit), "position",
                             std::to_string(row));
  };
  int64_t at = 0;
  for (int64_t row = 0; row < shape.n; ++row) {
    const int64_t end = ReadAt<int64_t>(tensor.csr_row_offsets(), row + 1);
    if (end < at || end > stored) {
      return invalid_row(row,
                         "row offsets must ascend up to the number of values",
                         end, stored);
    }
    int64_t last = -1;
    for (; at < end; ++at) {
      const int64_t column = ReadAt<int32_t>(tensor.csr_columns(), at);
      if (column <= last || column >= shape.k) {
        return invalid_row(row, "columns must ascend within a row, below K",
                           column, shape.k);
      }
      last = column;
      put(row * shape.k + column, at);
    }
  }
  if (at != stored) {
    return invalid("the last row offset must be the number of values", at,
                   stored);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> DecodeTokens(const v1::Datum& datum,
                                                  int64_t datum_index,
                                                  const RequestLimits& limits) {
  const Where where = {datum_index, "model_input"};
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

absl::Status DecodeTargets(const v1::TensorData& tensor, const Where& where,
                           const LossInfo& loss, const RequestLimits& limits,
                           TrainDatum& out) {
  if (tensor.dtype() != v1::DATA_TYPE_INT64 &&
      tensor.dtype() != v1::DATA_TYPE_INT32) {
    return where.Error("DTYPE_MISMATCH")
        .With("value", TypeName(tensor.dtype()))
        .With("limit", "DATA_TYPE_INT64")
        .Message(where.Name() + " must be int64.");
  }
  const auto n = static_cast<int64_t>(out.tokens.size());
  GW_ASSIGN_OR_RETURN(Shape shape, ShapeOf(tensor, n, where));
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

absl::Status DecodeFloats(const v1::TensorData& tensor, const Where& where,
                          const TrainDatum& datum, PerTarget per_target,
                          std::vector<float>& out) {
  if (tensor.dtype() != v1::DATA_TYPE_FLOAT32) {
    return where.Error("DTYPE_MISMATCH")
        .With("value", TypeName(tensor.dtype()))
        .With("limit", "DATA_TYPE_FLOAT32")
        .Message(where.Name() + " must be float32.");
  }
  const auto n = static_cast<int64_t>(datum.tokens.size());
  GW_ASSIGN_OR_RETURN(Shape shape, ShapeOf(tensor, n, where));
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
    const Where where = {
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
    return Where{datum_index, unknown->substr(0, 64)}
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
    return Where{datum_index, name}
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

absl::StatusOr<std::vector<float>> DecodeGradient(const v1::GradientItem& item,
                                                  int64_t n, int64_t k) {
  TrainDatum datum;
  datum.tokens.resize(n);
  datum.k = k;
  std::vector<float> out;
  const Where where = {item.datum_index(), "d_logprobs"};
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

namespace {

bool IsAlnum(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
         (c >= 'A' && c <= 'Z');
}

}  // namespace

absl::Status CheckName(const std::string& name, const std::string& field) {
  const bool good = !name.empty() && name.size() <= 128 && name[0] != '.' &&
                    std::all_of(name.begin(), name.end(), [](char c) {
                      return IsAlnum(c) || c == '.' || c == '_' || c == '-';
                    });
  if (good) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
      .With("field", field)
      .With("value", name.substr(0, 128))
      .With("limit", "1-128 of [A-Za-z0-9._-]")
      .Message(field +
               " must be 1 to 128 of [A-Za-z0-9._-], not starting with "
               "a dot.");
}

absl::Status CheckJobId(const std::string& job_id) {
  const bool good =
      !job_id.empty() && job_id.size() <= 63 && job_id[0] != '-' &&
      std::all_of(job_id.begin(), job_id.end(), [](char c) {
        return (IsAlnum(c) && !(c >= 'A' && c <= 'Z')) || c == '-';
      });
  if (good) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
      .With("field", "job_id")
      .With("value", job_id.substr(0, 64))
      .With("limit", "1-63 of [a-z0-9-]")
      .Message(
          "job_id must be 1 to 63 of [a-z0-9-], starting with a letter or "
          "digit.");
}

}  // namespace gradwire
