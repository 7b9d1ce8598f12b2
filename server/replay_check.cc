// SPDX-License-Identifier: Apache-2.0
#include "server/replay_check.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/match.h"
#include "google/protobuf/map.h"

namespace gradwire {
namespace {

using Metrics = google::protobuf::Map<std::string, double>;

// NaN is close to nothing, as a loss that is NaN says nothing.
bool IsClose(double a, double b, double relative, double absolute) {
  return std::abs(a - b) <=
         relative * std::max(std::abs(a), std::abs(b)) + absolute;
}

double ValueOr(const Metrics& metrics, const std::string& key, double other) {
  const auto it = metrics.find(key);
  return it == metrics.end() ? other : it->second;
}

bool AreClose(const Metrics& had, const Metrics& has) {
  if (had.size() != has.size()) return false;
  const double tokens = ValueOr(had, "tokens:sum", 1);
  return std::all_of(had.begin(), had.end(), [&](const auto& metric) {
    const auto& [key, value] = metric;
    const auto other = has.find(key);
    if (other == has.end()) return false;
    if (key == "tokens:sum" || key == "sequences:sum") {
      return value == other->second;
    }
    // Of other metrics, such as the largest ratio, rounding may make anything.
    if (!absl::StartsWith(key, "loss:")) return true;
    const double per = absl::EndsWith(key, ":sum") ? std::max(1.0, tokens) : 1;
    return IsClose(value, other->second, kReplayTolerance,
                   kReplayTolerance * per);
  });
}

}  // namespace

bool IsWithinTolerance(const v1::Operation& had, int64_t weight_version,
                       int64_t optimizer_step, const v1::RankDone& has) {
  if (has.has_error() || has.weight_version() != weight_version ||
      has.optimizer_step() != optimizer_step) {
    return false;
  }
  switch (had.result_case()) {
    case v1::Operation::kForward:
      return has.has_forward() &&
             had.forward().datum_count() == has.forward().datum_count() &&
             AreClose(had.forward().metrics(), has.forward().metrics());
    case v1::Operation::kBackward:
      return has.has_backward() &&
             AreClose(had.backward().metrics(), has.backward().metrics());
    case v1::Operation::kOptimStep: {
      const v1::OptimStepResult& a = had.optim_step();
      const v1::OptimStepResult& b = has.optim_step();
      return has.has_optim_step() && a.skipped() == b.skipped() &&
             a.loss_tokens() == b.loss_tokens() &&
             a.sequences() == b.sequences() &&
             IsClose(a.grad_norm(), b.grad_norm(), kReplayNormTolerance, 0);
    }
    case v1::Operation::kLoadState:
      // Bits that were in a file.
      return false;
    default:
      return true;
  }
}

}  // namespace gradwire
