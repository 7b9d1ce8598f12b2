// SPDX-License-Identifier: Apache-2.0
#include "trainer/trainer.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "checkpoint/publish.h"
#include "kernels/squares.h"
#include "sharding/reduced_gradients.h"
#include "trainer/memory_plan.h"
#include "trainer/model_files.h"
#include "trainer/trainer_impl.h"

namespace gradwire {
namespace {

constexpr int64_t kConfigLimit = 1 << 20;

}  // namespace

UnitPlaces TrainerImpl::Places() const {
  return options_.reshard_after_forward ? PlacesInTurns(layout_)
                                        : PlacesForAll(layout_);
}

EmbeddingRows::Options TrainerImpl::RowOptions() const {
  EmbeddingRows::Options rows;
  rows.layout = &layout_;
  rows.vocab = config_.vocab;
  rows.hidden = config_.hidden;
  rows.act = options_.precision == Precision::kF32 ? DType::kF32 : DType::kBF16;
  rows.max_tokens = PlannedMicroBatch(config_, options_);
  rows.tied = table_.head() == table_.embedding();
  return rows;
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
      if (adds_embedding_rows()) {
        gathered_bytes_ += EmbeddingRows::Bytes(RowOptions());
      }
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
    state_.digest = parameters_.Alloc("digest", DType::kI64, {2});
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
  step.embedding_rows = embedding_rows_.get();
  if (alone()) step.squares = state_.squares;
  step.max_tokens = PlannedMicroBatch(config_, options_);
  step.max_positions = plan_.max_context;
  step.scratch_bytes = plan_.workspace - gathered_bytes_;
  GW_ASSIGN_OR_RETURN(step_, TrainStep::Create(step, device_, kernels_));
  GW_ASSIGN_OR_RETURN(agreement_, Agreement::Create(options_.collectives,
                                                    device_, step_->stream()));
  GW_ASSIGN_OR_RETURN(shard_agreement_,
                      Agreement::Create(shards_, device_, step_->stream()));
  optimizer_ = std::make_unique<Optimizer>(
      table_, state_,
      Optimizer::Sharding{layout_, shard_rank_, *shard_agreement_, alone()},
      device_, kernels_, step_->stream());
  GW_ASSIGN_OR_RETURN(FlatWeights weights, Weights());
  // Beside the loading, and what comes before the first step. Not under the
  // eyes of ranks that have yet to make their plan of what the host has; and a
  // tenth of that is left, as it is by the plan.
  if (device_.IsHostMemory() && !options_.forward_only &&
      options_.ranks_on_host == 1 && Prefault::HasOneMemory()) {
    prefault_ = std::make_unique<Prefault>(
        state_.weight.raw(), parameters_.used_bytes(), plan_.available / 10);
  }
  return LoadParameters(files, table_, layout_, shard_rank_, weights,
                        on_progress);
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
                                              *shards_, device_));
  if (options_.forward_only) return absl::OkStatus();
  GW_ASSIGN_OR_RETURN(
      std::unique_ptr<ReducedGradients> gradients,
      ReducedGradients::Create(layout_, PlacesInTurns(layout_), state_.gradient,
                               *shards_, device_));
  if (adds_embedding_rows()) {
    GW_ASSIGN_OR_RETURN(
        embedding_rows_,
        EmbeddingRows::Create(RowOptions(), state_.gradient, *gradients,
                              *shards_, device_, kernels_));
  }
  unit_gradients_ = std::move(gradients);
  return absl::OkStatus();
}

MemoryUse TrainerImpl::memory_use() const {
  MemoryUse use;
  use.weights = plan_.weights;
  // They lie behind each other: Load.
  int64_t present = prefault_ == nullptr ? 0 : prefault_->present();
  present = std::max<int64_t>(0, present - plan_.weights);
  use.gradients = std::min(present, plan_.gradients);
  use.optimizer = std::min(present - use.gradients, plan_.optimizer);
  // A step without a backward zeroes them.
  if (has_gradients_ || optimizer_->step() > 0) {
    use.gradients = plan_.gradients;
  }
  if (optimizer_->step() > 0) use.optimizer = plan_.optimizer;
  use.activations = ranges_->Peak();
  use.workspace = step_->PeakScratchBytes() + gathered_bytes_;
  return use;
}

absl::StatusOr<OptimOutcome> TrainerImpl::OptimStep(const OptimParams& params) {
  GW_CHECK(!options_.forward_only);
  // What the next forward begins with is on its way while later units still
  // change. It is there before it changes again: the norm's sum, which AdamW
  // waits for, comes behind it in the queue.
  Optimizer::OnUnit on_unit;
  on_unit.after = [this](int unit) {
    if (unit == 0) unit_weights_->NewVersion();
    if (unit < unit_weights_->room()) {
      unit_weights_->Prefetch(step_->stream(), unit);
    }
  };
  on_unit.before = [this](int unit) { AwaitRead(unit); };
  GW_ASSIGN_OR_RETURN(OptimOutcome outcome, optimizer_->Step(params, on_unit));
  if (!outcome.skipped) {
    has_moments_ = true;
    ++weight_version_;
    // Activations of other weights are of no use; inputs stay.
    while (EvictOne()) {
    }
  }
  return outcome;
}

void TrainerImpl::ZeroGrad() { optimizer_->Clear(); }

bool TrainerImpl::is_tainted() const {
  return optimizer_ != nullptr && optimizer_->accumulated().tainted;
}

void TrainerImpl::Taint() { optimizer_->accumulated().tainted = true; }

int64_t TrainerImpl::Reset() {
  const int64_t dropped = optimizer_->accumulated().ops;
  optimizer_->Clear();
  while (!order_.empty()) Release(std::string(order_.back()));
  return dropped;
}

absl::StatusOr<std::vector<float>> TrainerImpl::Collect(
    const ParamRow& row,
    const std::function<absl::Status(const ShardPiece&, float*)>& read) {
  std::vector<float> values(row.num_elements);
  for (const ShardPiece& piece :
       layout_.Pieces(row.offset, row.offset + row.num_elements)) {
    float* const to = values.data() + (piece.begin - row.offset);
    if (piece.rank == shard_rank_) GW_RETURN_IF_ERROR(read(piece, to));
    GW_RETURN_IF_ERROR(
        shard_agreement_->Broadcast(to, piece.size(), piece.rank));
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

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(
    const TrainerOptions& options, Device& device, Kernels& kernels,
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
