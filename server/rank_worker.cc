// SPDX-License-Identifier: Apache-2.0
#include "server/rank_worker.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "kernels/cpu/cpu_kernels.h"
#include "server/decode_datum.h"
#include "server/decode_options.h"
#include "server/default_precision.h"
#include "server/grpc_status.h"
#include "server/rank_group_join.h"
#include "server/rank_share.h"
#include "server/version.h"
#include "trainer/losses.h"
#include "trainer/rank_plan.h"

namespace gradwire {
namespace {

v1::MemoryPlan ToProto(const MemoryPlan& plan) {
  v1::MemoryPlan out;
  out.set_weights(plan.weights);
  out.set_gradients(plan.gradients);
  out.set_optimizer(plan.optimizer);
  out.set_activations(plan.activations);
  out.set_workspace(plan.workspace);
  out.set_total(plan.total);
  out.set_available(plan.available);
  out.set_micro_batch_tokens(plan.micro_batch_tokens);
  out.set_max_context_length(plan.max_context);
  out.set_retained_tokens(plan.retained_tokens);
  return out;
}

// A line of /proc/self/status, in bytes; 0 if there is none.
int64_t ProcessBytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(key + ":", 0) == 0) {
      return std::atoll(line.c_str() + key.size() + 1) * 1024;
    }
  }
  return 0;
}

v1::MemoryUse ToProto(const MemoryUse& use, int64_t other) {
  v1::MemoryUse out;
  out.set_weights(use.weights);
  out.set_gradients(use.gradients);
  out.set_optimizer(use.optimizer);
  out.set_activations(use.activations);
  out.set_workspace(use.workspace);
  out.set_other(other);
  out.set_total(use.weights + use.gradients + use.optimizer + use.activations +
                use.workspace + other);
  out.set_resident_peak(ProcessBytes("VmHWM"));
  return out;
}

// With the first dimension; others are the caller's.
v1::TensorData FloatTensor(const std::vector<float>& values, int64_t n) {
  v1::TensorData tensor;
  tensor.set_dtype(v1::DATA_TYPE_FLOAT32);
  tensor.add_shape(n);
  tensor.set_data(values.data(), values.size() * sizeof(float));
  return tensor;
}

// `matrix`: whether the datum's targets were [n, k], rather than [n].
v1::LogprobItem ToItem(const DatumLogprobs& datum, const TrainDatum& source,
                       bool matrix, int64_t top_k) {
  const auto n = static_cast<int64_t>(source.tokens.size());
  v1::LogprobItem item;
  item.set_datum_index(datum.index);
  *item.mutable_logprobs() = FloatTensor(datum.logprobs, n);
  if (matrix) item.mutable_logprobs()->add_shape(source.k);
  if (top_k > 0) {
    v1::TensorData& logprobs = *item.mutable_top_k_logprobs();
    logprobs = FloatTensor(datum.top_k_logprobs, n);
    logprobs.add_shape(top_k);
    v1::TensorData& indices = *item.mutable_top_k_indices();
    indices.set_dtype(v1::DATA_TYPE_INT64);
    indices.add_shape(n);
    indices.add_shape(top_k);
    const std::vector<int64_t> wide(datum.top_k_indices.begin(),
                                    datum.top_k_indices.end());
    indices.set_data(wide.data(), wide.size() * sizeof(int64_t));
  }
  return item;
}

template <typename Map>
void CopyMetrics(const std::map<std::string, double>& metrics, Map& out) {
  for (const auto& [name, value] : metrics) out[name] = value;
}

}  // namespace

RankWorker::RankWorker(int threads, RankLink* link)
    : link_(*link), device_(threads), kernels_(NewCpuKernels()) {}

bool RankWorker::Execute(const v1::RankCommand& command) {
  if (command.has_datums()) {
    datums_.push_back(command.datums());
    return true;
  }
  if (command.has_gradients()) {
    gradients_.push_back(command.gradients());
    return true;
  }
  if (command.has_load()) return Load(command.load());
  v1::RankEvent event;
  v1::RankDone& done = *event.mutable_done();
  done.set_command_id(command.command_id());
  const absl::Status status = Run(command, done);
  datums_.clear();
  gradients_.clear();
  if (!status.ok()) {
    done.clear_result();
    *done.mutable_error() = ToOperationError(status);
  }
  done.set_weight_version(trainer_->weight_version());
  done.set_optimizer_step(trainer_->optimizer_step());
  *done.mutable_memory_use() = ToProto(trainer_->memory_use(), other_bytes_);
  link_.Send(event);
  return true;
}

absl::Status RankWorker::Run(const v1::RankCommand& command,
                             v1::RankDone& done) {
  switch (command.command_case()) {
    case v1::RankCommand::kForward:
      return Forward(command.command_id(), command.forward(), done);
    case v1::RankCommand::kBackward:
      return Backward(command.backward(), done);
    case v1::RankCommand::kOptimStep:
      return OptimStep(command.optim_step(), done);
    case v1::RankCommand::kZeroGrad:
      trainer_->ZeroGrad();
      done.mutable_zero_grad();
      return absl::OkStatus();
    case v1::RankCommand::kSaveSnapshot:
      return SaveSnapshot(command.save_snapshot(), done);
    case v1::RankCommand::kReleaseActivationId:
      trainer_->Release(command.release_activation_id());
      done.mutable_release();
      return absl::OkStatus();
    case v1::RankCommand::kReset:
      done.set_dropped_ops(trainer_->Reset());
      return absl::OkStatus();
    default:
      return ErrorBuilder(absl::StatusCode::kInternal, "COMMAND_UNKNOWN")
          .Server()
          .Message("The supervisor is of another build than the rank.");
  }
}

absl::StatusOr<std::unique_ptr<Collectives>> RankWorker::JoinGroup(
    const v1::RankLoad& load) {
  RankGroupJoin join;
  join.rank = rank_;
  join.world = world_;
  join.timeout = absl::Seconds(load.collective_timeout_seconds());
  join.exchange = [&](const std::string& mine) {
    constexpr int kWorldGroup = 0;
    return link_.ExchangeAddresses(kWorldGroup, mine, join.timeout);
  };
  return JoinRankGroup(join);
}

bool RankWorker::Load(const v1::RankLoad& load) {
  rank_ = load.rank();
  world_ = load.world_size();
  const auto fail = [&](const absl::Status& status) {
    v1::RankEvent event;
    *event.mutable_failed() = ToOperationError(status);
    link_.Send(event);
    return false;
  };
  const auto progress = [&](v1::JobPhase phase, double share) {
    v1::RankEvent event;
    event.mutable_progress()->set_phase(phase);
    event.mutable_progress()->set_progress(share);
    return event;
  };
  TrainerOptions options;
  options.model_directory = load.spec().base_model();
  const PrecisionChoice choice =
      ChoosePrecision(load.spec().precision(), kernels_->description());
  options.precision = choice.precision;
  spdlog::info("{}, precision {}: {}", kernels_->description(),
               PrecisionName(choice.precision), choice.reason);
  options.moment_precision = load.spec().moment_precision() == "bf16"
                                 ? Precision::kBF16
                                 : Precision::kF32;
  options.max_context = load.spec().max_context_length();
  options.activation_bytes = load.spec().activation_bytes();
  options.micro_batch_tokens = load.spec().micro_batch_tokens();
  options.forward_only = load.spec().forward_only();
  if (world_ > 1) link_.Send(progress(v1::JOB_PHASE_COLLECTIVES, 0));
  auto collectives = JoinGroup(load);
  if (!collectives.ok()) return fail(collectives.status());
  collectives_ = *std::move(collectives);
  options.collectives = collectives_.get();
  other_bytes_ = ProcessBytes("VmRSS");
  double reported = 0;
  auto trainer = Trainer::Create(
      options, device_, *kernels_,
      [&](const MemoryPlan& plan) {
        const auto mib = [](int64_t bytes) { return bytes >> 20; };
        spdlog::info(
            "memory plan: weights {} MiB, gradients {} MiB, optimizer {} MiB, "
            "activations {} MiB, workspace {} MiB; {} of {} MiB available",
            mib(plan.weights), mib(plan.gradients), mib(plan.optimizer),
            mib(plan.activations), mib(plan.workspace), mib(plan.total),
            mib(plan.available));
        v1::RankEvent event = progress(v1::JOB_PHASE_LOADING, 0);
        *event.mutable_progress()->mutable_memory() = ToProto(plan);
        link_.Send(event);
      },
      [&](double share) {
        if (share < 1 && share - reported < 0.05) return;
        reported = share;
        link_.Send(progress(v1::JOB_PHASE_LOADING, share));
      });
  if (!trainer.ok()) return fail(trainer.status());
  trainer_ = *std::move(trainer);
  link_.Send(progress(v1::JOB_PHASE_WARMING, 0));
  auto profile = WarmUp(load);
  if (!profile.ok()) return fail(profile.status());
  v1::RankEvent ready;
  profile->set_precision(PrecisionName(options.precision));
  if (!options.forward_only) {
    profile->set_moment_precision(PrecisionName(options.moment_precision));
  }
  *ready.mutable_ready()->mutable_profile() = *std::move(profile);
  *ready.mutable_ready()->mutable_memory() = ToProto(trainer_->plan());
  ready.mutable_ready()->set_quadratic(
      QuadraticCost(trainer_->config(), trainer_->num_parameters()));
  link_.Send(ready);
  return true;
}

absl::StatusOr<v1::Profile> RankWorker::WarmUp(const v1::RankLoad& load) {
  // Ready means that a forward succeeds: one datum for each rank.
  TrainDatum datum;
  datum.tokens = {0};
  datum.targets = {0};
  ForwardOptions options;
  for (int rank = 0; world_ > 1 && rank < world_; ++rank) {
    options.share.tokens.push_back(1);
    options.share.k.push_back(1);
    options.share.rank_of.push_back(rank);
  }
  GW_RETURN_IF_ERROR(
      trainer_->Forward({datum}, options, [](DatumLogprobs) {}).status());
  const ModelConfig& config = trainer_->config();
  v1::Profile profile;
  profile.set_job_id(load.job_id());
  const std::string name =
      std::filesystem::path(load.spec().base_model()).filename();
  profile.set_model_name(name);
  profile.set_tokenizer_id(name);
  profile.set_architecture(config.architecture);
  profile.set_vocab_size(config.vocab);
  profile.set_num_parameters(trainer_->num_parameters());
  profile.set_trainable(!load.spec().forward_only());
  profile.set_mode(load.spec().forward_only() ? "forward_only" : "full");
  profile.set_max_context_length(trainer_->plan().max_context);
  profile.set_world_size(world_);
  profile.set_device(kernels_->description() + ", " +
                     std::to_string(device_.pool().num_threads()) + " threads");
  for (const LossInfo& info : LossTable()) {
    v1::LossProfile& loss = *profile.add_losses();
    loss.set_loss_fn(info.name);
    loss.add_required_inputs("target_tokens");
    for (const auto& input : info.required) loss.add_required_inputs(input);
    for (const auto& input : info.optional) loss.add_optional_inputs(input);
    for (const LossKey& key : info.config) {
      if (key.default_value) {
        (*loss.mutable_config_defaults())[key.name] = *key.default_value;
      }
    }
  }
  profile.set_max_top_k(
      static_cast<int32_t>(std::min<int64_t>(64, config.vocab)));
  profile.add_modalities("text");
  profile.set_activation_bytes(trainer_->plan().activations);
  *profile.mutable_memory() = ToProto(trainer_->plan());
  profile.set_durability_level("NONE");
  profile.set_server_version(kVersion);
  return profile;
}

absl::Status RankWorker::Forward(int64_t command_id,
                                 const v1::RankForward& command,
                                 v1::RankDone& done) {
  ForwardOptions options;
  options.top_k = command.top_k();
  options.backward = command.backward();
  if (command.retain()) options.activation_id = command.activation_id();
  GW_ASSIGN_OR_RETURN(options.loss, DecodeLoss(command.loss(), &options.top_k));
  const LossInfo& info = *FindLoss(options.loss.name);
  RequestLimits limits;
  limits.vocab = trainer_->config().vocab;
  limits.max_context = trainer_->plan().max_context;
  std::vector<TrainDatum> data;
  std::vector<bool> matrix;
  // Of the rank's datums, in the whole call.
  std::vector<int64_t> indices =
      OwnDatums(command.rank_of(), rank_, command.rank_of_size());
  for (v1::DatumChunk& chunk : datums_) {
    for (const v1::Datum& datum : chunk.datums()) {
      if (world_ == 1) indices.push_back(static_cast<int64_t>(data.size()));
      GW_ASSIGN_OR_RETURN(
          TrainDatum decoded,
          DecodeDatum(datum, indices.at(data.size()), info, limits));
      data.push_back(std::move(decoded));
      matrix.push_back(
          datum.loss_fn_inputs().at("target_tokens").shape_size() == 2);
    }
    chunk.Clear();
  }
  options.share.tokens.assign(command.tokens().begin(), command.tokens().end());
  options.share.k.assign(command.k().begin(), command.k().end());
  options.share.rank_of.assign(command.rank_of().begin(),
                               command.rank_of().end());
  v1::RankEvent event;
  event.mutable_logprobs()->set_command_id(command_id);
  GW_ASSIGN_OR_RETURN(
      ForwardOutcome outcome,
      trainer_->Forward(data, options, [&](DatumLogprobs datum) {
        const bool flush = datum.last_of_micro_batch;
        const auto own = static_cast<size_t>(
            std::lower_bound(indices.begin(), indices.end(), datum.index) -
            indices.begin());
        *event.mutable_logprobs()->mutable_chunk()->add_items() =
            ToItem(datum, data[own], matrix[own], options.top_k);
        if (!flush) return;
        link_.Send(event);
        event.mutable_logprobs()->clear_chunk();
      }));
  v1::ForwardResult& result = *done.mutable_forward();
  result.set_datum_count(world_ == 1 ? static_cast<int64_t>(data.size())
                                     : command.rank_of_size());
  CopyMetrics(outcome.metrics, *result.mutable_metrics());
  result.set_retained(outcome.retained);
  result.set_retained_layers(static_cast<int32_t>(outcome.retained_layers));
  return absl::OkStatus();
}

absl::Status RankWorker::Backward(const v1::RankBackward& command,
                                  v1::RankDone& done) {
  const std::vector<int64_t> indices =
      OwnDatums(command.rank_of(), rank_, command.datum_count());
  std::vector<std::vector<float>> d_logprobs(indices.size());
  for (const v1::GradientChunk& chunk : gradients_) {
    for (const v1::GradientItem& item : chunk.items()) {
      // Checked by the supervisor against the forward's shapes.
      const std::string& bytes = item.d_logprobs().data();
      const auto own =
          std::lower_bound(indices.begin(), indices.end(), item.datum_index());
      if (own == indices.end() || *own != item.datum_index() ||
          bytes.size() % sizeof(float) != 0) {
        return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                            "SHAPE_MISMATCH")
            .With("field", "d_logprobs")
            .With("datum_index", item.datum_index())
            .Message("A gradient does not fit its datum.");
      }
      std::vector<float>& d =
          d_logprobs[static_cast<size_t>(own - indices.begin())];
      d.resize(bytes.size() / sizeof(float));
      std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(d.data()));
    }
  }
  GW_ASSIGN_OR_RETURN(BackwardOutcome outcome,
                      trainer_->Backward(command.activation_id(), d_logprobs,
                                         command.allow_stale()));
  CopyMetrics(outcome.metrics, *done.mutable_backward()->mutable_metrics());
  done.mutable_backward()->set_recomputed(outcome.recomputed);
  return absl::OkStatus();
}

absl::Status RankWorker::OptimStep(const v1::AdamParams& params,
                                   v1::RankDone& done) {
  GW_ASSIGN_OR_RETURN(OptimParams decoded, DecodeAdamParams(params));
  GW_ASSIGN_OR_RETURN(OptimOutcome outcome, trainer_->OptimStep(decoded));
  v1::OptimStepResult& result = *done.mutable_optim_step();
  result.set_optimizer_step(trainer_->optimizer_step());
  result.set_weight_version(trainer_->weight_version());
  result.set_grad_norm(outcome.grad_norm);
  result.set_clip_factor(outcome.clip_factor);
  result.set_loss_tokens(outcome.loss_tokens);
  result.set_sequences(outcome.sequences);
  result.set_skipped(outcome.skipped);
  CopyMetrics(outcome.metrics, *result.mutable_metrics());
  *result.mutable_effective() = EncodeAdamParams(decoded);
  return absl::OkStatus();
}

absl::Status RankWorker::SaveSnapshot(const v1::RankSaveSnapshot& command,
                                      v1::RankDone& done) {
  GW_ASSIGN_OR_RETURN(ExportOutcome outcome,
                      trainer_->Export(command.directory()));
  v1::SnapshotResult& result = *done.mutable_snapshot();
  result.set_path(command.path());
  result.set_local_path(command.directory());
  result.set_type("base");
  result.set_bytes(outcome.bytes);
  result.set_digest(outcome.digest);
  return absl::OkStatus();
}

}  // namespace gradwire
