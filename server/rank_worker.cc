// SPDX-License-Identifier: Apache-2.0
#include "server/rank_worker.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "server/decode_datum.h"
#include "server/decode_options.h"
#include "server/grpc_status.h"
#include "server/rank_memory.h"
#include "server/rank_share.h"
#include "trainer/losses.h"

namespace gradwire {
namespace {

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

RankWorker::RankWorker(std::string device, int threads, std::string address,
                       RankLink* link)
    : link_(*link),
      address_(std::move(address)),
      device_(std::move(device)),
      threads_(threads) {}

bool RankWorker::Execute(v1::RankCommand command) {
  if (command.has_datums()) {
    datums_.push_back(std::move(*command.mutable_datums()));
    return true;
  }
  if (command.has_gradients()) {
    gradients_.push_back(std::move(*command.mutable_gradients()));
    return true;
  }
  if (command.has_load()) return Load(command.load());
  v1::RankEvent event;
  v1::RankDone& done = *event.mutable_done();
  done.set_command_id(command.command_id());
  const absl::Status status = Run(command, done);
  TellChoices();
  datums_.clear();
  gradients_.clear();
  const bool saves = command.has_save_state() || command.has_save_snapshot();
  if (saves && status.ok()) return true;
  if (!status.ok()) {
    done.clear_result();
    *done.mutable_error() = ToOperationError(status);
  }
  done.set_weight_version(trainer_->weight_version());
  done.set_optimizer_step(trainer_->optimizer_step());
  done.set_tainted(trainer_->is_tainted());
  *done.mutable_memory_use() = ToProto(trainer_->memory_use(), other_bytes_);
  for (Collectives* group : {group_.world.get(), group_.shards.get()}) {
    if (group == nullptr) continue;
    const Collectives::Statistics part = group->statistics();
    v1::CollectiveUse& use = *done.mutable_collective_use();
    use.set_bytes_sent(use.bytes_sent() + part.bytes_sent);
    use.set_collectives(use.collectives() + part.collectives);
    use.set_busy_seconds(use.busy_seconds() + part.busy_seconds);
    use.set_wait_seconds(use.wait_seconds() + part.wait_seconds);
  }
  link_.Send(event);
  return true;
}

absl::Status RankWorker::Run(const v1::RankCommand& command,
                             v1::RankDone& done) {
  const bool mends =
      command.has_load_state() || command.has_reset() || command.has_end_save();
  if (!trainer_->is_valid() && !mends) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "MODEL_STATE_INVALID")
        .Server()
        .Message(
            "Loading a checkpoint has failed half-way, so that the weights are "
            "of no use. Load one again, or unload the model.");
  }
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
      BeginSnapshot(command.save_snapshot(), done);
      return absl::OkStatus();
    case v1::RankCommand::kSaveState:
      return BeginSave(command.save_state(), done);
    case v1::RankCommand::kEndSave:
      return command.end_save().snapshot()
                 ? EndSnapshot(command.end_save(), done)
                 : EndSave(command.end_save(), done);
    case v1::RankCommand::kLoadState:
      return LoadState(command.load_state(), done);
    case v1::RankCommand::kReleaseActivationId:
      trainer_->Release(command.release_activation_id());
      done.mutable_release();
      return absl::OkStatus();
    case v1::RankCommand::kTaint:
      trainer_->Taint();
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

absl::Status RankWorker::DecodeBatch(const v1::RankForward& command,
                                     Batch& batch) {
  ForwardOptions& options = batch.options;
  options.top_k = command.top_k();
  options.backward = command.backward();
  if (command.retain()) options.activation_id = command.activation_id();
  GW_ASSIGN_OR_RETURN(options.loss, DecodeLoss(command.loss(), &options.top_k));
  const LossInfo& info = *FindLoss(options.loss.name);
  RequestLimits limits;
  limits.vocab = trainer_->config().vocab;
  limits.max_context = trainer_->plan().max_context;
  batch.indices = OwnDatums(command.rank_of(), rank_, command.rank_of_size());
  for (v1::DatumChunk& chunk : datums_) {
    for (const v1::Datum& datum : chunk.datums()) {
      if (world_ == 1) {
        batch.indices.push_back(static_cast<int64_t>(batch.data.size()));
      }
      GW_ASSIGN_OR_RETURN(
          TrainDatum decoded,
          DecodeDatum(datum, batch.indices.at(batch.data.size()), info,
                      limits));
      batch.data.push_back(std::move(decoded));
      batch.matrix.push_back(
          datum.loss_fn_inputs().at("target_tokens").shape_size() == 2);
    }
    chunk.Clear();
  }
  options.share.tokens.assign(command.tokens().begin(), command.tokens().end());
  options.share.k.assign(command.k().begin(), command.k().end());
  options.share.rank_of.assign(command.rank_of().begin(),
                               command.rank_of().end());
  return absl::OkStatus();
}

absl::Status RankWorker::Forward(int64_t command_id,
                                 const v1::RankForward& command,
                                 v1::RankDone& done) {
  Batch batch;
  // The others must not wait for a rank that has turned its batch away.
  GW_RETURN_IF_ERROR(trainer_->Agree(DecodeBatch(command, batch)));
  const std::vector<int64_t>& indices = batch.indices;
  v1::RankEvent event;
  event.mutable_logprobs()->set_command_id(command_id);
  GW_ASSIGN_OR_RETURN(
      ForwardOutcome outcome,
      trainer_->Forward(batch.data, batch.options, [&](DatumLogprobs datum) {
        const bool flush = datum.last_of_micro_batch;
        const auto own = static_cast<size_t>(
            std::lower_bound(indices.begin(), indices.end(), datum.index) -
            indices.begin());
        *event.mutable_logprobs()->mutable_chunk()->add_items() = ToItem(
            datum, batch.data[own], batch.matrix[own], batch.options.top_k);
        if (!flush) return;
        TellChoices();  // before what has their bits
        link_.Send(event);
        event.mutable_logprobs()->clear_chunk();
      }));
  v1::ForwardResult& result = *done.mutable_forward();
  result.set_datum_count(world_ == 1 ? static_cast<int64_t>(batch.data.size())
                                     : command.rank_of_size());
  CopyMetrics(outcome.metrics, *result.mutable_metrics());
  result.set_retained(outcome.retained);
  result.set_retained_layers(static_cast<int32_t>(outcome.retained_layers));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::vector<float>>> RankWorker::DecodeGradients(
    const v1::RankBackward& command) {
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
  return d_logprobs;
}

absl::Status RankWorker::Backward(const v1::RankBackward& command,
                                  v1::RankDone& done) {
  const auto d_logprobs = DecodeGradients(command);
  GW_RETURN_IF_ERROR(trainer_->Agree(d_logprobs.status()));
  GW_ASSIGN_OR_RETURN(BackwardOutcome outcome,
                      trainer_->Backward(command.activation_id(), *d_logprobs,
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
  GW_ASSIGN_OR_RETURN(*done.mutable_state_digest(), trainer_->StateDigest());
  return absl::OkStatus();
}

absl::Status RankWorker::LoadState(const v1::RankLoadState& command,
                                   v1::RankDone& done) {
  GW_ASSIGN_OR_RETURN(
      const int64_t dropped,
      trainer_->LoadState(command.directory(), command.optimizer()));
  v1::LoadStateResult& result = *done.mutable_load_state();
  result.set_path(command.path());
  result.set_optimizer(command.optimizer());
  done.set_dropped_ops(dropped);
  // Of weights that nothing changes, the checkpoint's are enough.
  if (forward_only_) return absl::OkStatus();
  GW_ASSIGN_OR_RETURN(*done.mutable_state_digest(), trainer_->StateDigest());
  return absl::OkStatus();
}

}  // namespace gradwire
