// SPDX-License-Identifier: Apache-2.0
// How a rank comes to be ready: joins its peers, loads its part of the model,
// and says what it can do. docs/sharding.md.
#include <algorithm>
#include <filesystem>
#include <string>
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "checkpoint/fence.h"
#include "server/default_precision.h"
#include "server/grpc_status.h"
#include "server/kernels_id.h"
#include "server/rank_group_join.h"
#include "server/rank_memory.h"
#include "server/rank_worker.h"
#include "server/version.h"
#include "trainer/losses.h"
#include "trainer/rank_plan.h"

namespace gradwire {

absl::Status RankWorker::JoinGroup(const v1::RankLoad& load) {
  if (world_ == 1) return absl::OkStatus();
  RankGroupJoin join;
  join.rank = rank_;
  join.world = world_;
  join.replicas = std::max(1, load.spec().replicas());
  join.timeout = absl::Seconds(load.collective_timeout_seconds());
  join.address = address_;
  join.backend = &backend_;
  join.exchange = [&](int mesh, const std::string& mine) {
    return link_.ExchangeAddresses(mesh, mine, join.timeout);
  };
  GW_ASSIGN_OR_RETURN(group_, JoinRankGroup(join));
  spdlog::info("rank {} of {} is connected, {} on this machine", rank_, world_,
               group_.ranks_on_host);
  return absl::OkStatus();
}

void RankWorker::AdoptChoices(const v1::RankLoad& load) {
  int refused = 0;
  absl::Status first;
  for (const std::string& choices : load.choices()) {
    const absl::Status adopted = backend_.kernels->AdoptChoices(choices);
    if (adopted.ok()) continue;
    ++refused;
    if (first.ok()) first = adopted;
  }
  if (refused == 0) return;
  // As other kernels would, they may give other bits.
  other_choices_ = true;
  spdlog::warn("{} of {} lists of what was decided before are not used: {}",
               refused, load.choices_size(), std::string(first.message()));
}

void RankWorker::TellChoices() {
  v1::RankEvent event;
  *event.mutable_choices()->mutable_choices() = backend_.kernels->TakeChoices();
  if (!event.choices().choices().empty()) link_.Send(event);
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
  auto backend = MakeRankBackend(device_, threads_);
  if (!backend.ok()) return fail(backend.status());
  backend_ = *std::move(backend);
  AdoptChoices(load);
  const std::string kernels = backend_.kernels->description();
  TrainerOptions options;
  options.model_directory = load.spec().base_model();
  const PrecisionChoice choice =
      ChoosePrecision(load.spec().precision(), kernels);
  options.precision = choice.precision;
  spdlog::info("{}, precision {}: {}", kernels, PrecisionName(choice.precision),
               choice.reason);
  options.moment_precision = load.spec().moment_precision() == "bf16"
                                 ? Precision::kBF16
                                 : Precision::kF32;
  options.max_context = load.spec().max_context_length();
  options.activation_bytes = load.spec().activation_bytes();
  options.micro_batch_tokens = load.spec().micro_batch_tokens();
  options.forward_only = forward_only_ = load.spec().forward_only();
  options.snapshot_shard_bytes = load.snapshot_shard_bytes();
  files_ =
      FencedFileSystem(PosixFileSystem(), load.epoch_directory(), load.epoch());
  options.files = files_.get();
  if (world_ > 1) link_.Send(progress(v1::JOB_PHASE_COLLECTIVES, 0));
  if (absl::Status joined = JoinGroup(load); !joined.ok()) return fail(joined);
  options.collectives = group_.world.get();
  options.shards = group_.shards.get();
  options.ranks_on_host = group_.ranks_on_host;
  options.reshard_after_forward = !load.spec().keep_gathered();
  other_bytes_ = ProcessBytes("VmRSS");
  double reported = 0;
  auto trainer = Trainer::Create(
      options, *backend_.device, *backend_.kernels,
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
  ready.mutable_ready()->set_kernels(
      KernelsId(ready.ready().profile().device()) +
      (other_choices_ ? ", not as decided before" : ""));
  ready.mutable_ready()->set_quadratic(
      QuadraticCost(trainer_->config(), trainer_->num_parameters()));
  TellChoices();
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
  profile.set_device(backend_.description());
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
  profile.set_durability_level("LOCAL");
  profile.set_server_version(kVersion);
  return profile;
}

}  // namespace gradwire
