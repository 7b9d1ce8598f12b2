// SPDX-License-Identifier: Apache-2.0
// A call's forward, micro-batch by micro-batch, with the backward of a built-in
// loss behind each; and what is kept for a backward that comes later.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "trainer/memory_plan.h"
#include "trainer/trainer_impl.h"

namespace gradwire {

bool AllZero(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(),
                     [](float value) { return value == 0; });
}

absl::Status CheckFinite(const PackedInputs& inputs, const int64_t* index_of,
                         const std::vector<float>& logprobs) {
  for (size_t i = 0; i < logprobs.size(); ++i) {
    if (std::isfinite(logprobs[i])) continue;
    const auto token = static_cast<int32_t>(i / inputs.k);
    const auto next = std::upper_bound(inputs.cu_seqlens.begin(),
                                       inputs.cu_seqlens.end(), token);
    const int64_t sequence = next - inputs.cu_seqlens.begin() - 1;
    return ErrorBuilder(absl::StatusCode::kInternal, "NONFINITE_OUTPUT")
        .Server()
        .With("field", "logprobs")
        .With("datum_index", index_of[sequence])
        .With("position", token - inputs.cu_seqlens[sequence])
        .With("value", logprobs[i])
        .Message(
            "The model's logprobs are not finite: its weights have diverged or "
            "were not finite to begin with. Start again from a good snapshot "
            "with a lower learning rate.");
  }
  return absl::OkStatus();
}

int64_t TrainerImpl::FullBytes(int64_t tokens) const {
  return ActivationBytesOf(config_, options_.precision, tokens, tokens)
      .Kept(config_.layers, config_.layers);
}

Kept TrainerImpl::Take(const PackedInputs& inputs, int64_t spare_bytes,
                       bool must) {
  const ActivationBytes bytes = ActivationBytesOf(
      config_, options_.precision, inputs.num_tokens(), inputs.num_rows());
  int64_t full = FullLayers(bytes, config_.layers, ranges_->LargestFree());
  while (full < 0 && must && EvictOne()) {
    full = FullLayers(bytes, config_.layers, ranges_->LargestFree());
  }
  Kept kept;
  if (full < 0) {
    GW_CHECK(!must);  // the plan has room for the largest micro-batch
    return kept;
  }
  const int64_t layers = bytes.Kept(config_.layers, full);
  int64_t head = HeadKeptBytes(kernels_, config_, options_.precision,
                               inputs.num_rows(), inputs.k);
  if (full < config_.layers ||
      ranges_->LargestFree() < layers + head + spare_bytes) {
    head = 0;
  }
  kept.offset = ranges_->Take(layers + head);
  kept.stored =
      step_->LayOut(static_cast<char*>(activations_->data()) + kept.offset,
                    inputs, full, head);
  return kept;
}

void TrainerImpl::Give(Kept& kept) {
  if (kept.offset >= 0) ranges_->Give(kept.offset);
  kept = Kept();
}

bool TrainerImpl::EvictOne() {
  for (auto id = order_.rbegin(); id != order_.rend(); ++id) {
    auto& batches = retained_[*id].batches;
    for (auto batch = batches.rbegin(); batch != batches.rend(); ++batch) {
      if (batch->kept.offset < 0) continue;
      Give(batch->kept);
      return true;
    }
  }
  return false;
}

std::vector<int64_t> TrainerImpl::IndexOf(const ForwardOptions& options,
                                          size_t num_datums) const {
  std::vector<int64_t> index_of(num_datums);
  if (alone()) {
    std::iota(index_of.begin(), index_of.end(), int64_t{0});
    return index_of;
  }
  const std::vector<int>& rank_of = options.share.rank_of;
  size_t own = 0;
  for (size_t i = 0; i < rank_of.size(); ++i) {
    if (rank_of[i] != rank_) continue;
    GW_CHECK(own < num_datums);
    index_of[own++] = static_cast<int64_t>(i);
  }
  GW_CHECK(own == num_datums);
  return index_of;
}

absl::Status TrainerImpl::RunMicroBatch(Call& call, const MicroBatch& batch,
                                        RetainedMicroBatch* retained,
                                        int64_t spare_bytes) {
  const ForwardOptions& options = call.options;
  const PackedInputs inputs = Pack(call.data, batch);
  Kept kept;
  if (options.backward || retained != nullptr) {
    kept = Take(inputs, spare_bytes, options.backward);
  }
  struct Return {
    TrainerImpl* trainer;
    Kept* kept;
    ~Return() { trainer->Give(*kept); }
  } give_back{this, &kept};
  auto head = step_->Forward(inputs, options.top_k,
                             kept.offset >= 0 ? &kept.stored : nullptr);
  // From here on the others are at the backward.
  const auto join = [&](const absl::Status& error) {
    if (options.backward && !alone()) GW_RETURN_IF_ERROR(JoinBackward());
    return error;
  };
  if (!head.ok()) return join(head.status());
  if (absl::Status finite = CheckFinite(
          inputs, call.index_of.data() + batch.begin, head->logprobs);
      !finite.ok()) {
    return join(finite);
  }

  std::vector<float> d_logprobs;
  for (int64_t i = batch.begin; i < batch.end; ++i) {
    const int64_t sequence = i - batch.begin;
    const int64_t first = inputs.cu_seqlens[sequence];
    const int64_t last = inputs.cu_seqlens[sequence + 1];
    const auto cut = [&](const auto& values, int64_t width) {
      auto begin = values.begin() + first * width;
      return std::decay_t<decltype(values)>(begin,
                                            begin + (last - first) * width);
    };
    DatumLogprobs out;
    out.index = call.index_of[i];
    out.last_of_micro_batch = i + 1 == batch.end;
    out.logprobs = cut(head->logprobs, batch.k);
    auto d = ComputeLoss(options.loss, call.data[i], out.logprobs, call.totals);
    // A plain forward reports logprobs whatever the loss makes of them.
    if (!d.ok() && options.backward) {
      return join(WithErrorMetadata(d.status(), "datum_index",
                                    std::to_string(out.index)));
    }
    if (options.backward) {
      d_logprobs.insert(d_logprobs.end(), d->begin(), d->end());
    }
    if (options.top_k > 0) {
      out.top_k_logprobs = cut(head->top_k_logprobs, options.top_k);
      out.top_k_indices = cut(head->top_k_indices, options.top_k);
    }
    call.sink(std::move(out));
  }
  if (options.backward) {
    if (!AllZero(d_logprobs)) {
      GW_RETURN_IF_ERROR(RunBackward(inputs, kept.stored, d_logprobs));
    } else if (!alone()) {
      GW_RETURN_IF_ERROR(JoinBackward());
    }
  }
  if (retained != nullptr) {
    retained->plan = batch;
    retained->inputs = inputs;
    retained->logprobs = std::move(head->logprobs);
    retained->kept = std::exchange(kept, Kept());
  }
  return absl::OkStatus();
}

absl::StatusOr<ForwardOutcome> TrainerImpl::Forward(
    const std::vector<TrainDatum>& data, const ForwardOptions& options,
    const LogprobSink& sink) {
  const bool retain = !options.activation_id.empty();
  GW_CHECK(!(retain && options.backward));
  GW_CHECK(!(options_.forward_only && (retain || options.backward)));
  Call call = {data, options, sink, IndexOf(options, data.size()), {}};
  Retained retained;
  retained.weight_version = weight_version_;
  retained.index_of = call.index_of;
  absl::Status status;
  const auto batches = PlanBatch(data, plan_.micro_batch_tokens);
  const auto own = static_cast<int64_t>(batches.size());
  retained.most_batches = alone() ? own
                                  : MostMicroBatches(options.share, world(),
                                                     plan_.micro_batch_tokens);
  // Layers of later micro-batches are worth more than the head of this one.
  int64_t later = 0;
  for (const MicroBatch& batch : batches) later += FullBytes(batch.tokens);
  for (int64_t i = 0; i < retained.most_batches; ++i) {
    if (i < own && status.ok()) {
      later -= FullBytes(batches[i].tokens);
      if (retain) retained.batches.emplace_back();
      status = RunMicroBatch(call, batches[i],
                             retain ? &retained.batches.back() : nullptr,
                             retain ? later : 0);
      continue;
    }
    // One rank alone has nobody to wait for.
    if (alone()) break;
    const absl::Status joined = JoinMicroBatch(options.backward);
    if (status.ok()) status = joined;
  }
  status = AgreeOn(status, call.totals);
  if (!status.ok()) {
    for (RetainedMicroBatch& batch : retained.batches) Give(batch.kept);
    if (options.backward) optimizer_->accumulated().tainted = true;
    return status;
  }
  ForwardOutcome outcome;
  outcome.metrics = call.totals.Metrics();
  if (options.backward) {
    Accumulated& accumulated = optimizer_->accumulated();
    ++accumulated.ops;
    accumulated.loss_tokens += call.totals.loss_tokens;
    accumulated.sequences += call.totals.sequences;
  }
  if (retain) {
    // Of a custom step the loss is the client's.
    outcome.metrics.erase("loss:sum");
    outcome.retained = true;
    outcome.retained_layers = config_.layers;
    for (const RetainedMicroBatch& batch : retained.batches) {
      outcome.retained = outcome.retained && batch.kept.offset >= 0;
      outcome.retained_layers =
          std::min(outcome.retained_layers, batch.kept.stored.full_layers);
    }
    std::vector<double> lost = {outcome.retained ? 0.0 : 1.0};
    GW_RETURN_IF_ERROR(agreement_->Sum(lost));
    outcome.retained = lost[0] == 0;
    Release(options.activation_id);
    retained_.emplace(options.activation_id, std::move(retained));
    order_.push_back(options.activation_id);
  }
  return outcome;
}

absl::Status TrainerImpl::JoinMicroBatch(bool backward) {
  GW_RETURN_IF_ERROR(step_->JoinForward());
  return backward ? JoinBackward() : absl::OkStatus();
}

absl::Status TrainerImpl::AgreeOn(const absl::Status& status,
                                  LossTotals& totals) {
  if (alone()) return status;
  std::vector<double> sums = {totals.loss,
                              static_cast<double>(totals.loss_tokens),
                              static_cast<double>(totals.sequences),
                              static_cast<double>(totals.ratios),
                              static_cast<double>(totals.clipped),
                              totals.gap,
                              totals.k3};
  GW_RETURN_IF_ERROR(agreement_->Agree(status, &sums));
  totals.loss = sums[0];
  totals.loss_tokens = static_cast<int64_t>(sums[1]);
  totals.sequences = static_cast<int64_t>(sums[2]);
  totals.ratios = static_cast<int64_t>(sums[3]);
  totals.clipped = static_cast<int64_t>(sums[4]);
  totals.gap = sums[5];
  totals.k3 = sums[6];
  return absl::OkStatus();
}

void TrainerImpl::Release(const std::string& activation_id) {
  auto found = retained_.find(activation_id);
  if (found == retained_.end()) return;
  for (RetainedMicroBatch& batch : found->second.batches) Give(batch.kept);
  retained_.erase(found);
  std::erase(order_, activation_id);
}

}  // namespace gradwire
