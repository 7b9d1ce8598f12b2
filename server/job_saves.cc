// SPDX-License-Identifier: Apache-2.0
// A save runs beside the operations that follow it: its ranks write while they
// execute others, and a second command makes what they wrote a checkpoint, or
// removes it. docs/checkpoints.md.
#include <algorithm>
#include <utility>

#include "server/checkpoint_catalogue.h"
#include "server/job.h"

namespace gradwire {

bool Job::WaitsForSave(const OpQueue& queue) const {
  if (!IsSaving()) return false;
  const OperationPtr next = queue.Find(queue.next_seq());
  return next != nullptr && WaitsForSave(*next);
}

bool Job::WaitsForSave(const Operation& op) const {
  if (op.kind == v1::OPERATION_KIND_UNLOAD_MODEL) return IsSaving();
  if (op.kind == v1::OPERATION_KIND_SAVE_SNAPSHOT) {
    return snapshot_save_.flight.has_value();
  }
  // A load may be of what is being saved.
  return state_save_.flight.has_value() &&
         (op.kind == v1::OPERATION_KIND_SAVE_STATE || op.loads);
}

bool Job::MayEndSave(const Save& save) const {
  if (!save.end.has_value()) return false;
  const OperationPtr& op = save.flight->op;
  if (save.flight->purpose != Flight::kOperation || op->replaces.empty() ||
      save.end->has_error()) {
    return true;
  }
  // What it replaces is what earlier ones, run again, would find: when all of
  // them are recorded, none is run again. All have ended, as the ranks answer
  // in order; saves, and what was cancelled, end in another order than theirs.
  const auto comes_before = [&](const OperationPtr& other) {
    return std::pair(other->handle, other->seq) <
           std::pair(op->handle, op->seq);
  };
  return std::none_of(ended_.begin(), ended_.end(), comes_before) &&
         std::none_of(recording_.begin(), recording_.end(), comes_before);
}

bool Job::OnWritten(const v1::RankDone& done) {
  for (Save* save : {&state_save_, &snapshot_save_}) {
    if (!save->flight.has_value() || save->flight->id != done.command_id()) {
      continue;
    }
    save->flight->id = 0;
    save->flight->optimizer_step = done.optimizer_step();
    save->flight->weight_version = done.weight_version();
    save->end.emplace().set_snapshot(save->flight->SavesSnapshot());
    if (done.has_error()) *save->end->mutable_error() = done.error();
    return true;
  }
  return false;
}

Job::Next Job::EndSave(Save& save) {
  Next next;
  next.id = next_command_++;
  *next.request.command.mutable_end_save() = *std::move(save.end);
  save.end.reset();
  // Until it is answered no other save begins.
  Flight flight = *save.flight;
  flight.id = next.id;
  in_flight_.push_back(std::move(flight));
  return next;
}

void Job::DropSaves() {
  state_save_ = {};
  snapshot_save_ = {};
}

bool Job::HasSaved(const std::string& path, const std::string& digest) const {
  bool found = false;
  for (const auto& [id, handle] : handles_) {
    handle->queue.Visit([&](const Operation& op) {
      found = found || (op.final_state == v1::OPERATION_STATE_DONE &&
                        op.record.save_state().path() == path &&
                        op.record.save_state().digest() == digest);
    });
  }
  return found;
}

bool Job::SavesSuspect() const {
  for (const Save* save : {&state_save_, &snapshot_save_}) {
    if (save->flight.has_value() &&
        save->flight->purpose == Flight::kOperation &&
        save->flight->op->crashes > 0) {
      return true;
    }
  }
  return false;
}

bool Job::SavesAgain() const {
  for (const Save* save : {&state_save_, &snapshot_save_}) {
    if (save->flight.has_value() &&
        save->flight->purpose == Flight::kOperation &&
        save->flight->op->is_again) {
      return true;
    }
  }
  return false;
}

bool Job::FindSaved(const Flight& save, const v1::RankDone& done) {
  const OperationPtr& op = save.op;
  if (done.error().reason() != "CHECKPOINT_EXISTS" ||
      op->kind != v1::OPERATION_KIND_SAVE_STATE || !op->is_again ||
      op->name_taken) {
    return false;
  }
  const auto name = done.error().metadata().find("value");
  if (name == done.error().metadata().end()) return false;
  const auto saved = environment_->catalogue().Get({id_, name->second});
  if (!saved.ok() || saved->optimizer_step() != save.optimizer_step ||
      saved->weight_version() != save.weight_version) {
    return false;
  }
  if (HasSaved(saved->path(), saved->digest())) return false;
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
