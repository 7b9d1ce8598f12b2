// SPDX-License-Identifier: Apache-2.0
#include "trainer/trainer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/publish.h"
#include "checkpoint/safetensors.h"
#include "device/arena.h"
#include "model/param_table.h"
#include "trainer/activation_store.h"
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
absl::Status CheckFinite(const PackedInputs& inputs, int64_t first_datum,
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
        .With("datum_index", first_datum + sequence)
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
        kernels_(kernels) {}

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

  absl::Status RunMicroBatch(const std::vector<TrainDatum>& data,
                             const MicroBatch& batch,
                             const ForwardOptions& options,
                             const LogprobSink& sink, LossTotals& totals,
                             RetainedMicroBatch* retained, int64_t spare_bytes);
  absl::Status CheckGradients(
      const Retained& retained,
      const std::vector<std::vector<float>>& d_logprobs) const;
  // Adds to the accumulator, or begins it.
  absl::Status RunBackward(const PackedInputs& inputs,
                           const StoredActivations& stored,
                           const std::vector<float>& d_logprobs);
  absl::Status BackwardMicroBatch(
      RetainedMicroBatch& batch,
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

  MemoryPlan plan_;
  Arena parameters_;
  std::unique_ptr<DeviceBuffer> activations_;
  std::unique_ptr<RangeAllocator> ranges_;
  std::unique_ptr<TrainStep> step_;
  FlatState state_;
  std::unique_ptr<Optimizer> optimizer_;

  int64_t weight_version_ = 0;
  bool has_gradients_ = false;  // a backward has run
  // By id; `order_` from oldest to newest.
  std::map<std::string, Retained> retained_;
  std::vector<std::string> order_;
};

absl::Status TrainerImpl::Plan() {
  MemoryInputs inputs;
  inputs.flat_elements = table_.num_elements();
  inputs.squares = table_.num_squares();
  inputs.available_bytes = device_.AvailableBytes();
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
  const int64_t n = table_.num_elements();
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
        parameters_.Alloc("squares", DType::kF64, {table_.num_squares()});
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

  TrainStep::Options step;
  step.config = &config_;
  step.table = &table_;
  step.precision = options_.precision;
  step.weights = state_.weight;
  step.gradients = state_.gradient;
  step.squares = state_.squares;
  step.max_tokens = PlannedMicroBatch(config_, options_);
  step.max_positions = plan_.max_context;
  step.scratch_bytes = plan_.workspace;
  GW_ASSIGN_OR_RETURN(step_, TrainStep::Create(step, device_, kernels_));
  optimizer_ = std::make_unique<Optimizer>(table_, state_, device_, kernels_,
                                           step_->stream());
  GW_ASSIGN_OR_RETURN(FlatWeights weights, Weights());
  return LoadParameters(files, table_, weights, on_progress);
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
  use.workspace = step_->PeakScratchBytes();
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

absl::Status TrainerImpl::RunMicroBatch(
    const std::vector<TrainDatum>& data, const MicroBatch& batch,
    const ForwardOptions& options, const LogprobSink& sink, LossTotals& totals,
    RetainedMicroBatch* retained, int64_t spare_bytes) {
  const PackedInputs inputs = Pack(data, batch);
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
  GW_RETURN_IF_ERROR(CheckFinite(inputs, batch.begin, head.logprobs));

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
    out.index = i;
    out.last_of_micro_batch = i + 1 == batch.end;
    out.logprobs = cut(head.logprobs, batch.k);
    auto d = ComputeLoss(options.loss, data[i], out.logprobs, totals);
    // A plain forward reports logprobs whatever the loss makes of them.
    if (!d.ok() && options.backward) {
      return WithErrorMetadata(d.status(), "datum_index", std::to_string(i));
    }
    if (options.backward) {
      d_logprobs.insert(d_logprobs.end(), d->begin(), d->end());
    }
    if (options.top_k > 0) {
      out.top_k_logprobs = cut(head.top_k_logprobs, options.top_k);
      out.top_k_indices = cut(head.top_k_indices, options.top_k);
    }
    sink(std::move(out));
  }
  if (options.backward && !AllZero(d_logprobs)) {
    GW_RETURN_IF_ERROR(RunBackward(inputs, kept.stored, d_logprobs));
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
  LossTotals totals;
  Retained retained;
  retained.weight_version = weight_version_;
  absl::Status status;
  const auto batches = PlanBatch(data, plan_.micro_batch_tokens);
  // Layers of later micro-batches are worth more than the head of this one.
  int64_t later = 0;
  for (const MicroBatch& batch : batches) later += FullBytes(batch.tokens);
  for (const MicroBatch& batch : batches) {
    later -= FullBytes(batch.tokens);
    if (retain) retained.batches.emplace_back();
    status = RunMicroBatch(data, batch, options, sink, totals,
                           retain ? &retained.batches.back() : nullptr,
                           retain ? later : 0);
    if (!status.ok()) break;
  }
  if (!status.ok()) {
    for (RetainedMicroBatch& batch : retained.batches) Give(batch.kept);
    if (options.backward) optimizer_->accumulated().tainted = true;
    return status;
  }
  ForwardOutcome outcome;
  outcome.metrics = totals.Metrics();
  if (options.backward) {
    Accumulated& accumulated = optimizer_->accumulated();
    ++accumulated.ops;
    accumulated.loss_tokens += totals.loss_tokens;
    accumulated.sequences += totals.sequences;
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

absl::Status TrainerImpl::BackwardMicroBatch(
    RetainedMicroBatch& batch,
    const std::vector<std::vector<float>>& d_logprobs, bool stale,
    double& surrogate, bool& recomputed) {
  std::vector<float> packed;
  packed.reserve(batch.logprobs.size());
  for (int64_t i = batch.plan.begin; i < batch.plan.end; ++i) {
    const int64_t s = i - batch.plan.begin;
    const int64_t size =
        (batch.inputs.cu_seqlens[s + 1] - batch.inputs.cu_seqlens[s]) *
        batch.plan.k;
    if (d_logprobs[i].empty()) {
      packed.resize(packed.size() + size);
    } else {
      packed.insert(packed.end(), d_logprobs[i].begin(), d_logprobs[i].end());
    }
  }
  if (AllZero(packed)) return absl::OkStatus();
  if (batch.kept.offset < 0) {
    recomputed = true;
    batch.kept = Take(batch.inputs, 0, true);
    GW_ASSIGN_OR_RETURN(HeadResults head,
                        step_->Forward(batch.inputs, 0, &batch.kept.stored));
    GW_RETURN_IF_ERROR(
        CheckFinite(batch.inputs, batch.plan.begin, head.logprobs));
    if (stale) batch.logprobs = std::move(head.logprobs);
  }
  recomputed = recomputed || batch.kept.stored.full_layers < config_.layers;
  for (size_t i = 0; i < packed.size(); ++i) {
    surrogate += double{packed[i]} * batch.logprobs[i];
  }
  return RunBackward(batch.inputs, batch.kept.stored, packed);
}

absl::StatusOr<BackwardOutcome> TrainerImpl::Backward(
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
  const bool stale = retained.weight_version != weight_version_;
  if (stale && !allow_stale) {
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
  BackwardOutcome outcome;
  LossTotals totals;
  absl::Status status;
  for (RetainedMicroBatch& batch : retained.batches) {
    status = BackwardMicroBatch(batch, d_logprobs, stale, totals.loss,
                                outcome.recomputed);
    if (!status.ok()) break;
    for (int64_t i = batch.plan.begin; i < batch.plan.end; ++i) {
      CountGradient(d_logprobs[i], batch.plan.k, totals);
    }
    // Room for the recomputation of the next.
    Give(batch.kept);
  }
  Release(activation_id);
  Accumulated& accumulated = optimizer_->accumulated();
  if (!status.ok()) {
    accumulated.tainted = true;
    return status;
  }
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
  return ExportParameters({options_.model_directory, config_json_}, table_,
                          state_.weight, device_, step_->stream(), directory);
}

absl::StatusOr<std::vector<float>> TrainerImpl::Gradient(
    const std::string& hf_name) {
  const ParamRow* row = table_.Find(hf_name);
  if (row == nullptr) {
    return absl::NotFoundError("no parameter " + hf_name);
  }
  std::vector<float> values(row->num_elements);
  if (!optimizer_->accumulated().written) return values;
  device_.CopyToHost(
      step_->stream(),
      state_.gradient.Rows(row->offset, row->offset + row->num_elements),
      values.data());
  GW_RETURN_IF_ERROR(step_->stream().Finish());
  return values;
}

absl::StatusOr<std::vector<float>> TrainerImpl::Weight(
    const std::string& hf_name) {
  const ParamRow* row = table_.Find(hf_name);
  if (row == nullptr) {
    return absl::NotFoundError("no parameter " + hf_name);
  }
  std::vector<float> values(row->num_elements);
  GW_ASSIGN_OR_RETURN(FlatWeights weights, Weights());
  GW_RETURN_IF_ERROR(
      weights.Read(row->offset, row->num_elements, values.data()));
  return values;
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
