// SPDX-License-Identifier: Apache-2.0
// The backward of a forward that was retained.
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "trainer/trainer_impl.h"

namespace gradwire {

absl::Status TrainerImpl::CheckGradients(
    const Retained& retained,
    const std::vector<std::vector<float>>& d_logprobs) const {
  const auto count = static_cast<size_t>(
      retained.batches.empty() ? 0 : retained.batches.back().plan.end);
  const auto mismatch = [](size_t value, size_t limit) {
    ErrorBuilder error(absl::StatusCode::kInvalidArgument, "SHAPE_MISMATCH");
    error.With("field", "d_logprobs")
        .With("value", static_cast<int64_t>(value))
        .With("limit", static_cast<int64_t>(limit));
    return error;
  };
  if (d_logprobs.size() != count) {
    return mismatch(d_logprobs.size(), count)
        .Message(
            "The gradients are of another number of datums than the "
            "forward.");
  }
  for (const RetainedMicroBatch& batch : retained.batches) {
    for (int64_t i = batch.plan.begin; i < batch.plan.end; ++i) {
      const int64_t s = i - batch.plan.begin;
      const auto expected = static_cast<size_t>(
          (batch.inputs.cu_seqlens[s + 1] - batch.inputs.cu_seqlens[s]) *
          batch.plan.k);
      const std::vector<float>& d = d_logprobs[i];
      if (!d.empty() && d.size() != expected) {
        return mismatch(d.size(), expected)
            .With("datum_index", i)
            .Message(
                "d_logprobs must be shaped like the datum's "
                "target_tokens.");
      }
      for (size_t t = 0; t < d.size(); ++t) {
        if (std::isfinite(d[t])) continue;
        return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                            "NONFINITE_INPUT")
            .With("field", "d_logprobs")
            .With("datum_index", i)
            .With("position", static_cast<int64_t>(t) / batch.plan.k)
            .With("value", d[t])
            .Message("d_logprobs must be finite.");
      }
    }
  }
  return absl::OkStatus();
}

absl::Status TrainerImpl::RunBackward(const PackedInputs& inputs,
                                      const StoredActivations& stored,
                                      const std::vector<float>& d_logprobs) {
  has_gradients_ = true;
  const bool accumulate =
      std::exchange(optimizer_->accumulated().written, true);
  return step_->Backward(inputs, stored, d_logprobs, accumulate);
}

absl::Status TrainerImpl::JoinBackward() {
  has_gradients_ = true;
  return step_->JoinBackward(
      std::exchange(optimizer_->accumulated().written, true));
}

absl::Status TrainerImpl::BackwardMicroBatch(
    RetainedMicroBatch* batch, const int64_t* index_of,
    const std::vector<std::vector<float>>& d_logprobs, bool stale,
    double& surrogate, bool& recomputed) {
  std::vector<float> packed;
  const MicroBatch plan = batch == nullptr ? MicroBatch() : batch->plan;
  for (int64_t i = plan.begin; i < plan.end; ++i) {
    const int64_t s = i - plan.begin;
    const int64_t size =
        (batch->inputs.cu_seqlens[s + 1] - batch->inputs.cu_seqlens[s]) *
        plan.k;
    if (d_logprobs[i].empty()) {
      packed.resize(packed.size() + size);
    } else {
      packed.insert(packed.end(), d_logprobs[i].begin(), d_logprobs[i].end());
    }
  }
  const bool work = !AllZero(packed);
  // A forward that one rank has to repeat needs the weights of all.
  std::vector<double> repeats = {work && batch->kept.offset < 0 ? 1.0 : 0.0};
  const bool repeat = repeats[0] > 0;
  GW_RETURN_IF_ERROR(agreement_->Sum(repeats));
  if (repeat) {
    recomputed = true;
    batch->kept = Take(batch->inputs, 0, true);
    auto head = step_->Forward(batch->inputs, 0, &batch->kept.stored);
    absl::Status status = head.status();
    if (status.ok()) {
      status = CheckFinite(batch->inputs, index_of, head->logprobs);
    }
    if (!status.ok()) {
      if (!alone()) GW_RETURN_IF_ERROR(JoinBackward());
      return status;
    }
    if (stale) batch->logprobs = std::move(head->logprobs);
  } else if (repeats[0] > 0) {
    GW_RETURN_IF_ERROR(step_->JoinForward());
  }
  if (!work) return alone() ? absl::OkStatus() : JoinBackward();
  recomputed = recomputed || batch->kept.stored.full_layers < config_.layers;
  for (size_t i = 0; i < packed.size(); ++i) {
    surrogate += double{packed[i]} * batch->logprobs[i];
  }
  return RunBackward(batch->inputs, batch->kept.stored, packed);
}

absl::StatusOr<Retained*> TrainerImpl::FindRetained(
    const std::string& activation_id,
    const std::vector<std::vector<float>>& d_logprobs, bool allow_stale) {
  auto found = retained_.find(activation_id);
  if (found == retained_.end()) {
    return ErrorBuilder(absl::StatusCode::kNotFound, "ACTIVATIONS_EXPIRED")
        .With("field", "activation_id")
        .With("value", activation_id.substr(0, 64))
        .Message(
            "No activations are kept under this id: they were used, released "
            "or have expired. Send the batch again as forward_backward with "
            "weights -dC/dlogprob.");
  }
  Retained& retained = found->second;
  GW_RETURN_IF_ERROR(CheckGradients(retained, d_logprobs));
  if (retained.weight_version != weight_version_ && !allow_stale) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "ACTIVATIONS_STALE")
        .With("field", "weight_version")
        .With("value", retained.weight_version)
        .With("limit", weight_version_)
        .Message(
            "The weights have changed since the forward. Run the forward "
            "again, or set allow_stale to take the gradient at the new "
            "weights.");
  }
  return &retained;
}

absl::StatusOr<BackwardOutcome> TrainerImpl::Backward(
    const std::string& activation_id,
    const std::vector<std::vector<float>>& d_logprobs, bool allow_stale) {
  auto found = FindRetained(activation_id, d_logprobs, allow_stale);
  GW_RETURN_IF_ERROR(agreement_->Agree(found.status(), nullptr));
  Retained& retained = **found;
  const bool stale = retained.weight_version != weight_version_;
  BackwardOutcome outcome;
  LossTotals totals;
  absl::Status status;
  const auto own = static_cast<int64_t>(retained.batches.size());
  for (int64_t i = 0; i < retained.most_batches; ++i) {
    // After a failure only the others' work is left to do.
    RetainedMicroBatch* batch =
        i < own && status.ok() ? &retained.batches[i] : nullptr;
    if (batch == nullptr && alone()) break;
    const absl::Status ran = BackwardMicroBatch(
        batch,
        batch == nullptr ? nullptr
                         : retained.index_of.data() + batch->plan.begin,
        d_logprobs, stale, totals.loss, outcome.recomputed);
    if (status.ok()) status = ran;
    if (!status.ok() || batch == nullptr) continue;
    for (int64_t d = batch->plan.begin; d < batch->plan.end; ++d) {
      CountGradient(d_logprobs[d], batch->plan.k, totals);
    }
    // Room for the recomputation of the next.
    Give(batch->kept);
  }
  Release(activation_id);
  status = AgreeOn(status, totals);
  Accumulated& accumulated = optimizer_->accumulated();
  if (!status.ok()) {
    accumulated.tainted = true;
    return status;
  }
  std::vector<double> recomputed = {outcome.recomputed ? 1.0 : 0.0};
  GW_RETURN_IF_ERROR(agreement_->Sum(recomputed));
  outcome.recomputed = recomputed[0] > 0;
  ++accumulated.ops;
  accumulated.loss_tokens += totals.loss_tokens;
  accumulated.sequences += totals.sequences;
  outcome.metrics = totals.Metrics();
  return outcome;
}

}  // namespace gradwire
