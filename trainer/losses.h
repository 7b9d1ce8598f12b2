// SPDX-License-Identifier: Apache-2.0
// The built-in losses: from logprobs to the loss and its gradient with respect
// to them, on the host in float32. docs/losses.md has the formulas.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "trainer/trainer.h"

namespace gradwire {

// A number that a loss reads from LossSpec::config.
struct LossKey {
  std::string name;
  // Empty: the feature is off unless the key is given.
  std::optional<double> default_value;
};

struct LossInfo {
  std::string name;
  // Names of loss_fn_inputs; target_tokens is required by every loss and is
  // not listed.
  std::vector<std::string> required, optional;
  std::vector<LossKey> config;
  // Whether targets may be [n, k] with k > 1.
  bool many_targets = false;
};

// One row per loss; requests are validated from it.
const std::vector<LossInfo>& LossTable();
// The row of a name, or null.
const LossInfo* FindLoss(std::string_view name);

// Sums over the datums of one operation.
struct LossTotals {
  double loss = 0;
  // Positions with a gradient that is not exactly 0, and datums with one.
  int64_t loss_tokens = 0, sequences = 0;
  // Over targets with a weight other than 0, of losses that read logprobs.
  int64_t ratios = 0, clipped = 0;
  double gap = 0, k3 = 0;

  // loss:sum, tokens:sum, sequences:sum; and, where ratios were seen,
  // clip_fraction:mean, logprob_gap:mean, kl_k3:mean.
  std::map<std::string, double> Metrics() const;
};

// Errors: INVALID_ARGUMENT UNKNOWN_LOSS, UNKNOWN_LOSS_CONFIG,
// LOSS_CONFIG_OUT_OF_RANGE (not finite, negative, eps_clip_c <= 1, bounds in
// the wrong order).
absl::Status CheckLossSpec(const LossSpec& spec);

// Adds one datum to `totals` and returns dL/dlogprob, [n, k]. Nothing is added
// on an error: INTERNAL NONFINITE_OUTPUT (the server's fault).
// REQUIRES: the datum and the spec satisfy their row of LossTable();
// `logprobs` is [n, k].
absl::StatusOr<std::vector<float>> ComputeLoss(
    const LossSpec& spec, const TrainDatum& datum,
    const std::vector<float>& logprobs, LossTotals& totals);

// Counts what a client's gradient [n, k] of one datum moves: as ComputeLoss
// does for its own.
void CountGradient(const std::vector<float>& d_logprobs, int64_t k,
                   LossTotals& totals);

}  // namespace gradwire
