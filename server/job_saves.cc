// SPDX-License-Identifier: Apache-2.0
// A save runs beside the operations that follow it: its ranks write while they
// execute others, and a second command makes what they wrote a checkpoint, or
// removes it. docs/checkpoints.md.
#include "server/checkpoint_catalogue.h"
#include "server/job.h"

namespace gradwire {

bool Job::WaitsForSave(const OpQueue& queue) const {
  if (!saving_.has_value()) return false;
  const OperationPtr next = queue.Find(queue.next_seq());
  // A load may be of what is being saved.
  return next != nullptr && (next->kind == v1::OPERATION_KIND_SAVE_STATE ||
                             next->kind == v1::OPERATION_KIND_LOAD_STATE);
}

void Job::OnWritten(const v1::RankDone& written) {
  saving_->id = 0;
  end_save_.emplace();
  if (written.has_error()) *end_save_->mutable_error() = written.error();
}

Job::Next Job::EndSave() {
  Next next;
  next.id = next_command_++;
  *next.request.command.mutable_end_save() = *std::move(end_save_);
  end_save_.reset();
  Flight flight = *std::move(saving_);
  flight.id = next.id;
  // Until it is answered no other save begins.
  saving_ = flight;
  saving_->id = 0;
  in_flight_.push_back(std::move(flight));
  return next;
}

bool Job::FindSaved(const OperationPtr& op, const v1::RankDone& done) {
  if (done.error().reason() != "CHECKPOINT_EXISTS" ||
      op->kind != v1::OPERATION_KIND_SAVE_STATE || !op->is_again ||
      op->name_taken) {
    return false;
  }
  const auto name = done.error().metadata().find("value");
  if (name == done.error().metadata().end()) return false;
  const auto saved = CheckpointCatalogue(environment_->jobs_directory)
                         .Get({id_, name->second});
  if (!saved.ok() || saved->optimizer_step() != done.optimizer_step() ||
      saved->weight_version() != done.weight_version()) {
    return false;
  }
  v1::SaveStateResult& result = *op->record.mutable_save_state();
  result.set_path(saved->path());
  result.set_local_path(saved->local_path());
  result.set_bytes(saved->bytes());
  result.set_digest(saved->digest());
  result.set_weight_version(saved->weight_version());
  result.set_optimizer_step(saved->optimizer_step());
  return true;
}

}  // namespace gradwire
