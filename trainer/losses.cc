// SPDX-License-Identifier: Apache-2.0
#include "trainer/losses.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/error.h"

namespace gradwire {
namespace {

// One target: lp, q, A, w, d and r as in docs/losses.md.
struct Point {
  float logprob = 0, old_logprob = 0, advantage = 0, weight = 1;
  float low = 0, high = 0;
};

struct PointLoss {
  float value = 0;  // without the weight
  float grad = 0;   // without the weight
  bool clipped = false;
};

struct Settings {
  std::string name;
  float low = 0, high = 0, log_cap = 0, beta = 0;
  float dual_clip = std::numeric_limits<float>::infinity();
};

float Setting(const LossSpec& spec, const LossInfo& info,
              const std::string& name, float absent) {
  for (const LossKey& key : info.config) {
    if (key.name != name) continue;
    if (auto it = spec.config.find(name); it != spec.config.end()) {
      return static_cast<float>(it->second);
    }
    if (key.default_value) return static_cast<float>(*key.default_value);
  }
  return absent;
}

// Per target [n, k] or per position [n].
float At(const std::vector<float>& x, int64_t i, int64_t n, int64_t k,
         float absent) {
  if (x.empty()) return absent;
  return static_cast<int64_t>(x.size()) == n * k ? x[i] : x[i / k];
}

// min(r A, clip(r) A), its sign turned. The gradient flows on closed intervals.
PointLoss ClippedSurrogate(const Point& p, float ratio, float dual_clip) {
  const float a = p.advantage;
  const float bounded = std::min(std::max(ratio, p.low), p.high);
  PointLoss out;
  out.value = std::max(-ratio * a, -bounded * a);
  const bool flows = (a > 0 && ratio <= p.high) || (a < 0 && ratio >= p.low);
  out.clipped = a != 0 && !flows;
  if (flows) out.grad = -ratio * a;
  if (a < 0 && ratio > dual_clip) {
    out.value = std::min(-dual_clip * a, out.value);
    out.grad = 0;
    out.clipped = true;
  }
  return out;
}

PointLoss LossAt(const Settings& set, const Point& p) {
  if (set.name == "cross_entropy") return {-p.logprob, -1.0f, false};
  const float gap = p.logprob - p.old_logprob;
  if (set.name == "dro") {
    return {-(p.logprob * p.advantage - set.beta / 2 * gap * gap),
            -(p.advantage - set.beta * gap), false};
  }
  const bool capped = set.log_cap > 0 && std::fabs(gap) > set.log_cap;
  const float ratio = std::exp(capped ? std::copysign(set.log_cap, gap) : gap);
  PointLoss out;
  if (set.name == "importance_sampling") {
    out.value = out.grad = -ratio * p.advantage;
  } else if (set.name == "cispo") {
    // The ratio is a constant here, so its cap stops no gradient.
    const float bounded = std::min(std::max(ratio, p.low), p.high);
    return {-bounded * p.logprob * p.advantage, -bounded * p.advantage,
            bounded != ratio};
  } else {
    out = ClippedSurrogate(p, ratio, set.dual_clip);
  }
  if (capped) out.grad = 0;
  return out;
}

// gspo: the mean of lp - q over the counted positions; 0 if none is.
double SequenceLogRatio(const TrainDatum& datum,
                        const std::vector<float>& logprobs) {
  const std::vector<float>& counts =
      !datum.sequence_ratio_mask.empty() ? datum.sequence_ratio_mask
      : !datum.weights.empty()           ? datum.weights
                                         : datum.advantages;
  double sum = 0;
  int64_t count = 0;
  for (size_t i = 0; i < logprobs.size(); ++i) {
    if (counts[i] == 0) continue;
    sum += static_cast<double>(logprobs[i]) - datum.logprobs[i];
    ++count;
  }
  return count == 0 ? 0 : sum / static_cast<double>(count);
}

std::vector<LossInfo> MakeLossTable() {
  const std::vector<std::string> ratio = {"logprobs", "advantages"};
  const std::vector<std::string> clip = {"weights", "clip_low_threshold",
                                         "clip_high_threshold"};
  const auto bounds = [](double low, double high) {
    return std::vector<LossKey>{{"clip_low_threshold", low},
                                {"clip_high_threshold", high},
                                {"ratio_log_cap", 20.0}};
  };
  std::vector<LossKey> dapo = bounds(0.8, 1.28);
  dapo.push_back({"eps_clip_c", std::nullopt});
  return {
      {"cross_entropy", {}, {"weights"}, {}, true},
      {"importance_sampling",
       ratio,
       {"weights"},
       {{"ratio_log_cap", 20.0}},
       true},
      {"ppo", ratio, clip, bounds(0.8, 1.2), false},
      {"cispo", ratio, clip, bounds(0.0, 4.0), false},
      {"dro", ratio, {"weights"}, {{"beta", 0.05}}, false},
      {"dapo", ratio, clip, dapo, false},
      {"gspo",
       ratio,
       {"weights", "sequence_ratio_mask"},
       {{"clip_low_threshold", 0.8},
        {"clip_high_threshold", 1.2},
        {"seq_ratio_log_cap", 10.0}},
       false},
  };
}

}  // namespace

const std::vector<LossInfo>& LossTable() {
  static const auto& table = *new std::vector<LossInfo>(MakeLossTable());
  return table;
}

const LossInfo* FindLoss(std::string_view name) {
  for (const LossInfo& info : LossTable()) {
    if (info.name == name) return &info;
  }
  return nullptr;
}

std::map<std::string, double> LossTotals::Metrics() const {
  std::map<std::string, double> out = {
      {"loss:sum", loss},
      {"tokens:sum", static_cast<double>(loss_tokens)},
      {"sequences:sum", static_cast<double>(sequences)}};
  if (ratios > 0) {
    const double count = static_cast<double>(ratios);
    out["clip_fraction:mean"] = static_cast<double>(clipped) / count;
    out["logprob_gap:mean"] = gap / count;
    out["kl_k3:mean"] = k3 / count;
  }
  return out;
}

absl::StatusOr<std::vector<float>> ComputeLoss(
    const LossSpec& spec, const TrainDatum& datum,
    const std::vector<float>& logprobs, LossTotals& totals) {
  const LossInfo* info = FindLoss(spec.name);
  GW_CHECK(info != nullptr);
  Settings set;
  set.name = spec.name;
  set.low = Setting(spec, *info, "clip_low_threshold", 0);
  set.high = Setting(spec, *info, "clip_high_threshold", 0);
  set.log_cap = Setting(spec, *info, "ratio_log_cap", 0);
  set.beta = Setting(spec, *info, "beta", 0);
  set.dual_clip = Setting(spec, *info, "eps_clip_c", set.dual_clip);

  const int64_t n = static_cast<int64_t>(datum.tokens.size());
  const int64_t k = datum.k;
  const bool sequence_ratio = spec.name == "gspo";
  float ratio = 1;
  bool ratio_capped = false;
  if (sequence_ratio) {
    const float mean = static_cast<float>(SequenceLogRatio(datum, logprobs));
    const float cap = Setting(spec, *info, "seq_ratio_log_cap", 0);
    ratio_capped = cap > 0 && mean > cap;
    ratio = std::exp(ratio_capped ? cap : mean);
  }

  std::vector<float> grads(n * k);
  LossTotals sum;
  for (int64_t t = 0; t < n; ++t) {
    bool counts = false;
    for (int64_t i = t * k; i < (t + 1) * k; ++i) {
      Point p;
      p.logprob = logprobs[i];
      p.old_logprob = At(datum.logprobs, i, n, k, 0);
      p.advantage = At(datum.advantages, i, n, k, 0);
      p.weight = At(datum.weights, i, n, k, 1);
      p.low = At(datum.clip_low, i, n, k, set.low);
      p.high = At(datum.clip_high, i, n, k, set.high);
      PointLoss at = sequence_ratio ? ClippedSurrogate(p, ratio, set.dual_clip)
                                    : LossAt(set, p);
      if (ratio_capped) at.grad = 0;
      grads[i] = p.weight * at.grad;
      const float value = p.weight * at.value;
      if (!std::isfinite(value) || !std::isfinite(grads[i])) {
        return ErrorBuilder(absl::StatusCode::kInternal, "NONFINITE_OUTPUT")
            .Server()
            .With("field", "logprobs")
            .With("position", t)
            .Message(
                "The loss or its gradient is not finite. Check the learning "
                "rate, and load the last good state if it persists.");
      }
      sum.loss += value;
      counts = counts || grads[i] != 0;
      if (!datum.logprobs.empty() && p.weight != 0) {
        const double gap = static_cast<double>(p.logprob) - p.old_logprob;
        ++sum.ratios;
        sum.clipped += at.clipped ? 1 : 0;
        sum.gap += std::fabs(gap);
        sum.k3 += std::expm1(gap) - gap;
      }
    }
    sum.loss_tokens += counts ? 1 : 0;
  }
  totals.loss += sum.loss;
  totals.loss_tokens += sum.loss_tokens;
  totals.sequences += sum.loss_tokens > 0 ? 1 : 0;
  totals.ratios += sum.ratios;
  totals.clipped += sum.clipped;
  totals.gap += sum.gap;
  totals.k3 += sum.k3;
  return grads;
}

absl::Status CheckLossSpec(const LossSpec& spec) {
  const LossInfo* info = FindLoss(spec.name);
  if (info == nullptr) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "UNKNOWN_LOSS")
        .With("field", "loss_fn")
        .With("value", spec.name.substr(0, 64))
        .Message(
            "loss_fn is not a built-in loss. Use one that the profile lists, "
            "or forward_backward_custom.");
  }
  const auto out_of_range = [&](const std::string& key, double value,
                                const std::string& limit) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                        "LOSS_CONFIG_OUT_OF_RANGE")
        .With("field", key)
        .With("value", value)
        .With("limit", limit)
        .Message(key + " of " + spec.name + " must be " + limit + ".");
  };
  for (const auto& [key, value] : spec.config) {
    const bool known =
        std::any_of(info->config.begin(), info->config.end(),
                    [&](const LossKey& k) { return k.name == key; });
    if (!known) {
      return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                          "UNKNOWN_LOSS_CONFIG")
          .With("field", key.substr(0, 64))
          .With("value", value)
          .Message(key.substr(0, 64) + " is not a setting of " + spec.name +
                   ". No built-in loss adds a KL term: fold it into the "
                   "advantages, or write a custom loss.");
    }
    if (!std::isfinite(value) || value < 0) {
      return out_of_range(key, value, "finite and >= 0");
    }
    if (key == "eps_clip_c" && value <= 1) {
      return out_of_range(key, value, "> 1");
    }
  }
  const float low = Setting(spec, *info, "clip_low_threshold", 0);
  const float high = Setting(spec, *info, "clip_high_threshold", low);
  if (low > high) {
    return out_of_range("clip_low_threshold", low,
                        "at most clip_high_threshold");
  }
  return absl::OkStatus();
}

void CountGradient(const std::vector<float>& d_logprobs, int64_t k,
                   LossTotals& totals) {
  int64_t counted = 0;
  for (size_t row = 0; row < d_logprobs.size(); row += k) {
    counted +=
        std::any_of(d_logprobs.begin() + row, d_logprobs.begin() + row + k,
                    [](float g) { return g != 0; })
            ? 1
            : 0;
  }
  totals.loss_tokens += counted;
  totals.sequences += counted > 0 ? 1 : 0;
}

}  // namespace gradwire
