// SPDX-License-Identifier: Apache-2.0
// A rank's saves: begun by one command, answered by a thread of their own, and
// ended by another command.
#include <string>
#include <utility>

#include "base/status.h"
#include "server/grpc_status.h"
#include "server/rank_worker.h"

namespace gradwire {

std::function<void(const absl::Status&)> RankWorker::AnswerOf(
    v1::RankDone done) {
  done.set_weight_version(trainer_->weight_version());
  done.set_optimizer_step(trainer_->optimizer_step());
  v1::RankEvent event;
  *event.mutable_done() = std::move(done);
  return [this, event](const absl::Status& status) mutable {
    if (!status.ok()) {
      event.mutable_done()->clear_result();
      *event.mutable_done()->mutable_error() = ToOperationError(status);
    }
    link_.Send(event);
  };
}

absl::Status RankWorker::BeginSave(const v1::RankSaveState& command,
                                   const v1::RankDone& done) {
  v1::RankDone answer = done;
  answer.mutable_save_state();
  saving_ = command;
  return trainer_->BeginSave(command.directory(), command.replaces(),
                             AnswerOf(std::move(answer)));
}

void RankWorker::BeginSnapshot(const v1::RankSaveSnapshot& command,
                               const v1::RankDone& done) {
  v1::RankDone answer = done;
  answer.mutable_snapshot();
  saving_snapshot_ = command;
  SnapshotOptions options;
  options.directory = command.directory();
  options.parent = command.parent();
  options.ttl_seconds = command.ttl_seconds();
  options.job = command.job_id();
  options.operation = command.operation();
  options.base_model = command.base_model();
  if (command.kind() == v1::SNAPSHOT_KIND_AUTO) {
    options.type = SnapshotType::kAuto;
  } else if (command.kind() == v1::SNAPSHOT_KIND_DELTA) {
    options.type = SnapshotType::kDelta;
  }
  trainer_->BeginSnapshot(options, AnswerOf(std::move(answer)));
}

absl::Status RankWorker::EndSave(const v1::RankEndSave& command,
                                 v1::RankDone& done) {
  if (command.has_error()) {
    trainer_->AbandonSave();
    return FromOperationError(command.error());
  }
  GW_ASSIGN_OR_RETURN(const SavedState saved,
                      trainer_->PublishSave({saving_.attributes().begin(),
                                             saving_.attributes().end()}));
  v1::SaveStateResult& result = *done.mutable_save_state();
  result.set_path(saving_.path());
  result.set_local_path(saving_.directory());
  result.set_bytes(saved.bytes);
  result.set_digest(saved.digest);
  result.set_weight_version(saved.weight_version);
  result.set_optimizer_step(saved.optimizer_step);
  return absl::OkStatus();
}

absl::Status RankWorker::EndSnapshot(const v1::RankEndSave& command,
                                     v1::RankDone& done) {
  if (command.has_error()) {
    trainer_->AbandonSnapshot();
    return FromOperationError(command.error());
  }
  GW_ASSIGN_OR_RETURN(const ExportOutcome outcome, trainer_->PublishSnapshot());
  v1::SnapshotResult& result = *done.mutable_snapshot();
  result.set_path(saving_snapshot_.path());
  result.set_local_path(saving_snapshot_.directory());
  result.set_type(outcome.type);
  result.set_parent(outcome.parent);
  result.set_bytes(outcome.bytes);
  result.set_digest(outcome.digest);
  result.set_weight_id(outcome.weight_id);
  result.set_reason(outcome.reason);
  result.set_weight_version(outcome.weight_version);
  result.set_optimizer_step(outcome.optimizer_step);
  return absl::OkStatus();
}

}  // namespace gradwire
