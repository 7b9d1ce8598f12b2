// SPDX-License-Identifier: Apache-2.0
#include "trainer/trainer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/publish.h"
#include "checkpoint/safetensors.h"
#include "device/arena.h"
#include "kernels/squares.h"
#include "model/param_table.h"
#include "sharding/gathered_weights.h"
#include "sharding/layout.h"
#include "sharding/reduced_gradients.h"
#include "sharding/units.h"
#include "trainer/activation_store.h"
#include "trainer/agreement.h"
#include "trainer/batch_plan.h"
#include "trainer/flat_weights.h"
#include "trainer/losses.h"
#include "trainer/memory_plan.h"
#include "trainer/model_files.h"
#include "trainer/optimizer.h"
#include "trainer/pack.h"
#include "trainer/train_step.h"

namespace gradwire {
namespace {

constexpr int64_t kConfigLimit = 1 << 20;

bool AllZero(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(),
                     [](float value) { return value == 0; });
}

// OK, or NONFINITE_OUTPUT naming the first datum and position.
// `index_of`: the call's indices of the micro-batch's datums.
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

// Activations of a micro-batch and their place in the activation memory.
struct Kept {
  int64_t offset = -1;  // -1: nowhere
  StoredActivations stored;
};

struct RetainedMicroBatch {
  MicroBatch plan;
  PackedInputs inputs;
  std::vector<float> logprobs;
  Kept kept;
};

struct Retained {
  int64_t weight_version = 0;
  std::vector<RetainedMicroBatch> batches;
  // Of the rank that has most.
  int64_t most_batches = 0;
  // The call's index of each datum of this rank.
  std::vector<int64_t> index_of;
};

class TrainerImpl : public Trainer {
 public:
  TrainerImpl(const TrainerOptions& options, std::string config_json,
              const ModelConfig& config, CpuDevice& device, Kernels& kernels)
      : options_(options),
        config_json_(std::move(config_json)),
        config_(config),
        table_(config_),
        device_(device),
        kernels_(kernels),
        rank_(options.collectives == nullptr ? 0 : options.collectives->rank()),
        layout_(
            table_.unit_begins(), table_.num_elements(),
            options.collectives == nullptr ? 1 : options.collectives->world()) {
  }

  absl::Status Plan();
  absl::Status Load(const HfWeights& files,
                    const std::function<void(double)>& on_progress);

  const ModelConfig& config() const override { return config_; }
  const ParamTable& table() const { return table_; }
  const MemoryPlan& plan() const override { return plan_; }
  MemoryUse memory_use() const override;
  int64_t num_parameters() const override { return table_.num_parameters(); }
  int64_t weight_version() const override { return weight_version_; }
  int64_t optimizer_step() const override { return optimizer_->step(); }

  absl::StatusOr<ForwardOutcome> Forward(const std::vector<TrainDatum>& data,
                                         const ForwardOptions& options,
                                         const LogprobSink& sink) override;
  absl::StatusOr<BackwardOutcome> Backward(
      const std::string& activation_id,
      const std::vector<std::vector<float>>& d_logprobs,
      bool allow_stale) override;
  void Release(const std::string& activation_id) override;
  absl::StatusOr<OptimOutcome> OptimStep(const OptimParams& params) override;
  void ZeroGrad() override;
  int64_t Reset() override;
  absl::StatusOr<ExportOutcome> Export(const std::string& directory) override;
  absl::StatusOr<std::vector<float>> Gradient(
      const std::string& hf_name) override;
  absl::StatusOr<std::vector<float>> Weight(
      const std::string& hf_name) override;

 private:
  // Takes activation memory for a micro-batch, in full if it can be had, and of
  // the head as well if `spare_bytes` are left then. With `must` it evicts what
  // other operations have retained, the newest first (their backwards come
  // last), until at least the layers' inputs fit.
  Kept Take(const PackedInputs& inputs, int64_t spare_bytes, bool must);
  // What a micro-batch takes in full, without the head.
  int64_t FullBytes(int64_t tokens) const;
  void Give(Kept& kept);
  bool EvictOne();

  // What all micro-batches of a call have in common.
  struct Call {
    const std::vector<TrainDatum>& data;
    const ForwardOptions& options;
    const LogprobSink& sink;
    std::vector<int64_t> index_of;
    LossTotals totals;
  };
  absl::Status RunMicroBatch(Call& call, const MicroBatch& batch,
                             RetainedMicroBatch* retained, int64_t spare_bytes);
  // The call's indices of this rank's datums.
  std::vector<int64_t> IndexOf(const ForwardOptions& options,
                               size_t num_datums) const;
  bool alone() const { return layout_.world() == 1; }
  UnitPlaces Places() const;
  absl::Status CreateUnits();
  // A parameter whose pieces `read` reads on the ranks that hold them.
  absl::StatusOr<std::vector<float>> Collect(
      const ParamRow& row,
      const std::function<absl::Status(const ShardPiece&, float*)>& read);
  absl::Status CheckGradients(
      const Retained& retained,
      const std::vector<std::vector<float>>& d_logprobs) const;
  // Adds to the accumulator, or begins it.
  absl::Status RunBackward(const PackedInputs& inputs,
                           const StoredActivations& stored,
                           const std::vector<float>& d_logprobs);
  // Take part in other ranks' work without any of one's own.
  absl::Status JoinBackward();
  absl::Status JoinMicroBatch(bool backward);
  // The first rank's error, or the totals of all.
  absl::Status AgreeOn(const absl::Status& status, LossTotals& totals);
  // Errors: those of Backward that can be said before it begins.
  absl::StatusOr<Retained*> FindRetained(
      const std::string& activation_id,
      const std::vector<std::vector<float>>& d_logprobs, bool allow_stale);
  // `batch` is null if this rank only takes part; `index_of` are the call's
  // indices of its datums.
  absl::Status BackwardMicroBatch(
      RetainedMicroBatch* batch, const int64_t* index_of,
      const std::vector<std::vector<float>>& d_logprobs, bool stale,
      double& surrogate, bool& recomputed);
  absl::StatusOr<FlatWeights> Weights() {
    return FlatWeights::Create(state_.weight, state_.low, device_, kernels_,
                               step_->stream());
  }

  const TrainerOptions options_;
  const std::string config_json_;
  const ModelConfig config_;
  const ParamTable table_;
  CpuDevice& device_;
  Kernels& kernels_;
  const int rank_;
  const ShardLayout layout_;

  MemoryPlan plan_;
  Arena parameters_;
  std::unique_ptr<DeviceBuffer> activations_;
  std::unique_ptr<UnitWeights> unit_weights_;
  std::unique_ptr<UnitGradients> unit_gradients_;  // null: forward only
  int64_t gathered_bytes_ = 0;
  std::unique_ptr<RangeAllocator> ranges_;
  std::unique_ptr<TrainStep> step_;
  std::unique_ptr<Agreement> agreement_;
  FlatState state_;
  std::unique_ptr<Optimizer> optimizer_;

  int64_t weight_version_ = 0;
  bool has_gradients_ = false;  // a backward has run
  // By id; `order_` from oldest to newest.
  std::map<std::string, Retained> retained_;
  std::vector<std::string> order_;
};

UnitPlaces TrainerImpl::Places() const {
  return options_.reshard_after_forward ? PlacesInTurns(layout_)
                                        : PlacesForAll(layout_);
}

absl::Status TrainerImpl::Plan() {
  MemoryInputs inputs;
  inputs.flat_elements = layout_.shard_elements();
  inputs.squares =
      alone() ? table_.num_squares() : SquareBlocks(layout_.shard_elements());
  if (!alone()) {
    const int64_t act = options_.precision == Precision::kBF16 ? 2 : 4;
    gathered_bytes_ = Places().total() * act;
    if (!options_.forward_only) {
      gathered_bytes_ += PlacesInTurns(layout_).total() * 4;
    }
    inputs.gathered_bytes = gathered_bytes_;
  }
  inputs.available_bytes = device_.AvailableBytes() / options_.ranks_on_host;
  const int64_t tokens = PlannedMicroBatch(config_, options_);
  inputs.kernel_workspace_bytes = KernelWorkspaceBytes(
      kernels_, config_, options_.precision, tokens, tokens);
  inputs.head_kept_bytes = HeadKeptBytes(kernels_, config_, options_.precision,
                                         UsualMicroBatch(options_), 1);
  GW_ASSIGN_OR_RETURN(plan_, PlanMemory(config_, options_, inputs));
  return absl::OkStatus();
}

absl::Status TrainerImpl::Load(const HfWeights& files,
                               const std::function<void(double)>& on_progress) {
  const int64_t n = layout_.shard_elements();
  const bool bf16 = options_.precision == Precision::kBF16;
  GW_ASSIGN_OR_RETURN(parameters_,
                      Arena::Create(device_, plan_.weights + plan_.gradients +
                                                 plan_.optimizer));
  state_.weight =
      parameters_.Alloc("weight", bf16 ? DType::kBF16 : DType::kF32, {n});
  if (!options_.forward_only) {
    if (bf16) state_.low = parameters_.Alloc("low", DType::kI16, {n});
    state_.gradient = parameters_.Alloc("gradient", DType::kF32, {n});
    state_.squares =
        parameters_.Alloc("squares", DType::kF64,
                          {alone() ? table_.num_squares() : SquareBlocks(n)});
    const DType moment = options_.moment_precision == Precision::kBF16
                             ? DType::kBF16
                             : DType::kF32;
    state_.m = parameters_.Alloc("m", moment, {n});
    state_.v = parameters_.Alloc("v", moment, {n});
  }
  if (plan_.activations > 0) {
    GW_ASSIGN_OR_RETURN(activations_, device_.Allocate(plan_.activations));
  }
  ranges_ = std::make_unique<RangeAllocator>(plan_.activations);
  GW_RETURN_IF_ERROR(CreateUnits());

  TrainStep::Options step;
  step.config = &config_;
  step.table = &table_;
  step.layout = &layout_;
  step.precision = options_.precision;
  step.weights = unit_weights_.get();
  step.gradients = unit_gradients_.get();
  if (alone()) step.squares = state_.squares;
  step.max_tokens = PlannedMicroBatch(config_, options_);
  step.max_positions = plan_.max_context;
  step.scratch_bytes = plan_.workspace - gathered_bytes_;
  GW_ASSIGN_OR_RETURN(step_, TrainStep::Create(step, device_, kernels_));
  GW_ASSIGN_OR_RETURN(agreement_, Agreement::Create(options_.collectives,
                                                    device_, step_->stream()));
  optimizer_ = std::make_unique<Optimizer>(
      table_, state_, Optimizer::Sharding{layout_, rank_, *agreement_}, device_,
      kernels_, step_->stream());
  GW_ASSIGN_OR_RETURN(FlatWeights weights, Weights());
  return LoadParameters(files, table_, layout_, rank_, weights, on_progress);
}

absl::Status TrainerImpl::CreateUnits() {
  if (alone()) {
    unit_weights_ = std::make_unique<ResidentWeights>(layout_, state_.weight);
    if (!options_.forward_only) {
      unit_gradients_ =
          std::make_unique<ResidentGradients>(layout_, state_.gradient);
    }
    return absl::OkStatus();
  }
  GW_ASSIGN_OR_RETURN(unit_weights_,
                      GatheredWeights::Create(layout_, Places(), state_.weight,
                                              *options_.collectives, device_));
  if (options_.forward_only) return absl::OkStatus();
  GW_ASSIGN_OR_RETURN(
      unit_gradients_,
      ReducedGradients::Create(layout_, PlacesInTurns(layout_), state_.gradient,
                               *options_.collectives, device_));
  return absl::OkStatus();
}

int64_t TrainerImpl::FullBytes(int64_t tokens) const {
  return ActivationBytesOf(config_, options_.precision, tokens, tokens)
      .Kept(config_.layers, config_.layers);
}

MemoryUse TrainerImpl::memory_use() const {
  MemoryUse use;
  use.weights = plan_.weights;
  // A step without a backward zeroes them.
  if (has_gradients_ || optimizer_->step() > 0) {
    use.gradients = plan_.gradients;
  }
  if (optimizer_->step() > 0) use.optimizer = plan_.optimizer;
  use.activations = ranges_->Peak();
  use.workspace = step_->PeakScratchBytes() + gathered_bytes_;
  return use;
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
  GW_ASSIGN_OR_RETURN(
      HeadResults head,
      step_->Forward(inputs, options.top_k,
                     kept.offset >= 0 ? &kept.stored : nullptr));
  // From here on the others are at the backward.
  const auto join = [&](const absl::Status& error) {
    if (options.backward && !alone()) GW_RETURN_IF_ERROR(JoinBackward());
    return error;
  };
  if (absl::Status finite = CheckFinite(
          inputs, call.index_of.data() + batch.begin, head.logprobs);
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
    out.logprobs = cut(head.logprobs, batch.k);
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
      out.top_k_logprobs = cut(head.top_k_logprobs, options.top_k);
      out.top_k_indices = cut(head.top_k_indices, options.top_k);
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
    retained->logprobs = std::move(head.logprobs);
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
  retained.most_batches = alone()
                              ? own
                              : MostMicroBatches(options.share, layout_.world(),
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
    Release(options.activation_id);
    retained_.emplace(options.activation_id, std::move(retained));
    order_.push_back(options.activation_id);
  }
  return outcome;
}

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
    GW_ASSIGN_OR_RETURN(HeadResults head,
                        step_->Forward(batch->inputs, 0, &batch->kept.stored));
    if (absl::Status finite =
            CheckFinite(batch->inputs, index_of, head.logprobs);
        !finite.ok()) {
      if (!alone()) GW_RETURN_IF_ERROR(JoinBackward());
      return finite;
    }
    if (stale) batch->logprobs = std::move(head.logprobs);
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

void TrainerImpl::Release(const std::string& activation_id) {
  auto found = retained_.find(activation_id);
  if (found == retained_.end()) return;
  for (RetainedMicroBatch& batch : found->second.batches) Give(batch.kept);
  retained_.erase(found);
  std::erase(order_, activation_id);
}

absl::StatusOr<OptimOutcome> TrainerImpl::OptimStep(const OptimParams& params) {
  GW_CHECK(!options_.forward_only);
  GW_ASSIGN_OR_RETURN(OptimOutcome outcome, optimizer_->Step(params));
  if (!outcome.skipped) {
    ++weight_version_;
    unit_weights_->NewVersion();
    // Activations of other weights are of no use; inputs stay.
    while (EvictOne()) {
    }
  }
  return outcome;
}

void TrainerImpl::ZeroGrad() { optimizer_->Clear(); }

int64_t TrainerImpl::Reset() {
  const int64_t dropped = optimizer_->accumulated().ops;
  optimizer_->Clear();
  while (!order_.empty()) Release(std::string(order_.back()));
  return dropped;
}

absl::StatusOr<ExportOutcome> TrainerImpl::Export(
    const std::string& directory) {
  // The first rank writes what all of them hold.
  auto outcome = ExportParameters(
      {options_.model_directory, config_json_, state_.weight.dtype()}, table_,
      layout_, *unit_weights_, device_, step_->stream(),
      rank_ == 0 ? directory : std::string());
  GW_RETURN_IF_ERROR(agreement_->Agree(outcome.status(), nullptr));
  return outcome;
}

absl::StatusOr<std::vector<float>> TrainerImpl::Collect(
    const ParamRow& row,
    const std::function<absl::Status(const ShardPiece&, float*)>& read) {
  std::vector<float> values(row.num_elements);
  for (const ShardPiece& piece :
       layout_.Pieces(row.offset, row.offset + row.num_elements)) {
    float* const to = values.data() + (piece.begin - row.offset);
    if (piece.rank == rank_) GW_RETURN_IF_ERROR(read(piece, to));
    GW_RETURN_IF_ERROR(agreement_->Broadcast(to, piece.size(), piece.rank));
  }
  return values;
}

absl::StatusOr<std::vector<float>> TrainerImpl::Gradient(
    const std::string& hf_name) {
  const ParamRow* row = table_.Find(hf_name);
  if (row == nullptr) {
    return absl::NotFoundError("no parameter " + hf_name);
  }
  if (!optimizer_->accumulated().written) {
    return std::vector<float>(row->num_elements);
  }
  return Collect(*row, [&](const ShardPiece& piece, float* to) {
    device_.CopyToHost(
        step_->stream(),
        state_.gradient.Rows(piece.offset, piece.offset + piece.size()), to);
    return step_->stream().Finish();
  });
}

absl::StatusOr<std::vector<float>> TrainerImpl::Weight(
    const std::string& hf_name) {
  const ParamRow* row = table_.Find(hf_name);
  if (row == nullptr) {
    return absl::NotFoundError("no parameter " + hf_name);
  }
  GW_ASSIGN_OR_RETURN(FlatWeights weights, Weights());
  return Collect(*row, [&](const ShardPiece& piece, float* to) {
    return weights.Read(piece.offset, piece.size(), to);
  });
}

}  // namespace

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(
    const TrainerOptions& options, CpuDevice& device, Kernels& kernels,
    const std::function<void(const MemoryPlan&)>& on_plan,
    const std::function<void(double)>& on_progress) {
  GW_ASSIGN_OR_RETURN(
      std::string json,
      ReadSmallFile(options.model_directory + "/config.json", kConfigLimit));
  GW_ASSIGN_OR_RETURN(ModelConfig config, ParseModelConfig(json));
  GW_ASSIGN_OR_RETURN(std::unique_ptr<HfWeights> files,
                      HfWeights::Open(options.model_directory));
  auto trainer = std::make_unique<TrainerImpl>(options, std::move(json), config,
                                               device, kernels);
  GW_RETURN_IF_ERROR(CheckTensors(*files, trainer->table(), trainer->config()));
  GW_RETURN_IF_ERROR(trainer->Plan());
  on_plan(trainer->plan());
  GW_RETURN_IF_ERROR(trainer->Load(*files, on_progress));
  return trainer;
}

}  // namespace gradwire
