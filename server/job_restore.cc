// SPDX-License-Identifier: Apache-2.0
// A job as an earlier process has left it: its handles, the operations that
// have ended, those that are to run, and what recovery has to do.
// docs/recovery.md.
#include <algorithm>
#include <set>

#include "base/log.h"
#include "base/status.h"
#include "checkpoint/training_state.h"
#include "google/protobuf/util/time_util.h"
#include "server/grpc_status.h"
#include "server/job.h"
#include "server/job_errors.h"
#include "server/journal_records.h"

namespace gradwire {
namespace {

OperationPtr NewOperation(const std::string& model_id,
                          const std::string& session_id, int64_t handle,
                          int64_t seq) {
  auto op = std::make_shared<Operation>();
  op->op_id = model_id + "." + std::to_string(seq);
  op->model_id = model_id;
  op->session_id = session_id;
  op->handle = handle;
  op->seq = seq;
  op->submitted = Clock::now();
  op->record.set_op_id(op->op_id);
  op->record.set_model_id(model_id);
  op->record.set_seq_id(seq);
  op->record.set_queue_state(v1::QUEUE_STATE_ACTIVE);
  return op;
}

}  // namespace

void Job::Restore(const JobRow& row) {
  absl::MutexLock lock(&mu_);
  *job_.mutable_create_time() =
      google::protobuf::util::TimeUtil::MicrosecondsToTimestamp(
          row.created_microseconds);
  if (row.state == JobRow::kDeleted) {
    Decide({JobEvent::kDelete}, job_);
    Decide({JobEvent::kStopped}, job_);
    RemoveDurableState();
    return;
  }
  // What requests are checked against, and spread by, until ranks are back.
  v1::RankReady ready;
  if (ready.ParseFromString(row.profile)) {
    profile_ = ready.profile();
    quadratic_ = ready.quadratic();
    known_ready_ = row.profile;
  }
  absl::Status restored = OpenJournal(row);
  if (restored.ok()) restored = RestoreOperations(row);
  if (!restored.ok()) {
    spdlog::error("job {}: its state cannot be restored: {}", id_,
                  std::string(restored.message()));
    journal_broken_ = true;
  } else if (row.state == JobRow::kFailed) {
    v1::OperationError error;
    error.ParseFromString(row.error);
    restored = FromOperationError(error);
  }
  if (!restored.ok()) {
    JobEvent failed{JobEvent::kRanksFailed};
    failed.status = restored;
    Decide(failed, job_);
    for (auto& [id, handle] : handles_) Fence(*handle, restored);
    // Nor does a restart of the job begin what it was to begin with.
    for (std::deque<OperationPtr>* queue : {&again_, &control_}) {
      for (const OperationPtr& op : *queue) {
        Finish(op, v1::OPERATION_STATE_FAILED, restored);
      }
      queue->clear();
    }
    return;
  }
  recovering_ = !handles_.empty();
  recovery_.set_cause("SERVER_STARTED");
  recovery_began_ = Clock::now();
}

absl::Status Job::RestoreOperations(const JobRow& row) {
  GW_ASSIGN_OR_RETURN(const auto handles, environment_->metadata->Handles(id_));
  GW_ASSIGN_OR_RETURN(const auto rows, environment_->metadata->Operations(id_));
  GW_ASSIGN_OR_RETURN(points_, environment_->metadata->Points(id_));
  GW_ASSIGN_OR_RETURN(choices_, environment_->metadata->Choices(id_));
  choices_recorded_ = choices_.size();
  GW_RETURN_IF_ERROR(RemoveStrayPoints());
  if (!points_.empty()) {
    next_point_ = points_.back().number + 1;
    history_from_ = points_.front().replay_from;
    job_.set_optimizer_step(points_.back().optimizer_step);
    job_.set_weight_version(points_.back().weight_version);
  }
  std::map<int64_t, Handle*> by_number;
  for (const HandleRow& handle : handles) {
    RestoreHandle(handle);
    by_number[handle.number] = handles_.at(handle.model_id).get();
  }

  std::map<std::pair<int64_t, int64_t>, OperationPtr> operations;
  const auto find = [&](int64_t number, int64_t seq) -> OperationPtr {
    const auto handle = by_number.find(number);
    // It was being made when the server ended, and nobody was told.
    if (handle == by_number.end()) return nullptr;
    OperationPtr& op = operations[{number, seq}];
    if (op == nullptr) {
      op = NewOperation(handle->second->model_id, handle->second->session_id,
                        number, seq);
    }
    return op;
  };
  for (const OperationRow& ended : rows) {
    v1::JournalOutcome outcome;
    const OperationPtr op = find(ended.handle, ended.seq);
    if (op == nullptr || !outcome.ParseFromString(ended.outcome)) continue;
    TakeOutcome(outcome, *op);
    // Unless the log still has them.
    op->expired = HasArrays(*op);
  }
  GW_RETURN_IF_ERROR(journal_->Scan([&](Journal::Entry entry) {
    const OperationPtr op = find(entry.handle, entry.seq);
    if (op == nullptr) return absl::OkStatus();
    if (entry.op != nullptr) {
      op->logged_at = entry.begin;
      TakeOp(*entry.op, *op);
      return absl::OkStatus();
    }
    op->outcome_at = entry.begin;
    const bool is_new = !op->Ended();
    TakeOutcome(*entry.outcome, *op);
    op->stored = HasArrays(*op) && entry.outcome->logprobs_size() > 0;
    op->expired = HasArrays(*op) && !op->stored;
    if (is_new) unreferenced_.push_back(op);
    job_.set_weight_version(op->weight_version);
    job_.set_optimizer_step(op->optimizer_step);
    if (ChangesState(*op) && op->outcome_at >= history_from_) {
      history_.push_back(op);
    }
    return absl::OkStatus();
  }));
  referenced_at_ = row.log_begin;

  const auto now = Clock::now();
  for (const auto& [key, op] : operations) {
    Handle& handle = *by_number.at(key.first);
    if (op->seq == 0) {
      handle.reset = op;
      op->loads = BeginsWithLoad(handle);
    } else {
      handle.queue.Restore(op, now);
      if (op->Ended()) results_.push_back(op);
    }
    handle.closed_below = std::max(handle.closed_below, op->closed_below);
    if (op->kind == v1::OPERATION_KIND_UNLOAD_MODEL &&
        op->final_state == v1::OPERATION_STATE_DONE) {
      handle.unloaded = true;
    }
  }
  RestoreSaves(operations);
  for (const auto& [number, handle] : by_number) {
    for (const OperationPtr& op :
         handle->queue.CloseBelow(handle->closed_below)) {
      op->closed_below = handle->closed_below;
      Finish(op, v1::OPERATION_STATE_FAILED,
             handle == current_ ? SequenceGap(op->seq, 0) : Fenced());
    }
    CountDurable(*handle);
    if (handle == current_) continue;
    Fence(*handle, Fenced());
  }
  if (current_ != nullptr && current_->unloaded) Fence(*current_, Unloaded());
  if (current_ != nullptr && current_->reset != nullptr &&
      current_->reset->Ended() &&
      current_->reset->final_state != v1::OPERATION_STATE_DONE) {
    // What it was to begin with could not be loaded.
    current_->fenced = true;
    current_ = nullptr;
  }
  if (current_ != nullptr &&
      (current_->reset == nullptr || !current_->reset->Ended())) {
    // The server ended while it attached.
    if (current_->reset == nullptr || current_->reset->logged_at < 0) {
      current_->reset = ResetOf(*current_);
      GW_ASSIGN_OR_RETURN(current_->reset->logged_at, Log(current_->reset));
    }
    control_.push_back(current_->reset);
  }
  RestoreActivations();
  RestoreBeginning();
  RemoveStrayLoads(ListLoaded(), LoadsInUse());
  return absl::OkStatus();
}

void Job::RestoreSaves(
    const std::map<std::pair<int64_t, int64_t>, OperationPtr>& operations) {
  std::pair<int64_t, int64_t> last;
  for (const auto& [key, op] : operations) {
    if (op->Ended() && (op->ran || op->closed_below > 0)) last = key;
  }
  for (const auto& [key, op] : operations) {
    if (key > last) break;
    // One that had not begun would have ended before the last one ran, or with
    // it.
    if (IsSave(op->kind) && !op->Ended() && op->logged_at >= 0 &&
        (*FindHandle(op->model_id))->queue.Cancel(op)) {
      again_.push_back(op);
    }
  }
}

void Job::RestoreBeginning() {
  const Handle* first = FirstBegun();
  if (first == nullptr || first->reset == nullptr || !points_.empty()) return;
  const OperationPtr& begins = first->reset;
  // The log may have let it go, as all that did not change the weights.
  if (begins->loads && begins->Ended() &&
      std::find(history_.begin(), history_.end(), begins) == history_.end()) {
    if (history_.empty()) {
      // Nothing has changed it since.
      job_.set_weight_version(begins->weight_version);
      job_.set_optimizer_step(begins->optimizer_step);
    }
    // Before all that the log has.
    begins->outcome_at = std::max<int64_t>(0, begins->outcome_at);
    history_.push_front(begins);
  }
}

void Job::RestoreHandle(const HandleRow& row) {
  auto handle = std::make_unique<Handle>(environment_->queue);
  handle->number = row.number;
  handle->model_id = row.model_id;
  handle->session_id = row.session_id;
  handle->request.ParseFromString(row.request);
  handle->attached = row.attached;
  handle->closed_below = row.closed_below;
  handle->fenced = row.fenced;
  if (current_ != nullptr) current_->fenced = true;
  current_ = row.fenced ? nullptr : handle.get();
  num_handles_ = std::max(num_handles_, row.number);
  handles_[row.model_id] = std::move(handle);
}

void Job::RestoreActivations() {
  std::set<std::string> used;
  for (const OperationPtr& op : history_) {
    if (op->final_state != v1::OPERATION_STATE_DONE) continue;
    switch (op->kind) {
      case v1::OPERATION_KIND_BACKWARD:
      case v1::OPERATION_KIND_RELEASE_ACTIVATIONS:
        used.insert(op->activation_id);
        break;
      case v1::OPERATION_KIND_UNSPECIFIED:
      case v1::OPERATION_KIND_UNLOAD_MODEL:
      case v1::OPERATION_KIND_LOAD_STATE:
        activations_.clear();
        break;
      case v1::OPERATION_KIND_FORWARD: {
        if (op->activation_id.empty()) break;
        Activation& kept = activations_[op->activation_id];
        kept.session_id = op->session_id;
        kept.shapes = op->shapes;
        kept.rank_of = op->rank_of;
        kept.ttl = RetainTtl(*op);
        kept.delivered = Clock::now();
        kept.kept = true;
        break;
      }
      default:
        break;
    }
  }
  for (const std::string& id : used) activations_.erase(id);
  // Those that wait hold what they use, or will make.
  if (current_ == nullptr) return;
  current_->queue.Visit([&](const Operation& op) {
    if (op.Ended() || op.activation_id.empty()) return;
    if (op.kind == v1::OPERATION_KIND_FORWARD) {
      Activation& made = activations_[op.activation_id];
      made.session_id = op.session_id;
      made.shapes = op.shapes;
      made.rank_of = op.rank_of;
      made.ttl = RetainTtl(op);
      ++made.pins;
    } else if (auto it = activations_.find(op.activation_id);
               it != activations_.end()) {
      ++it->second.pins;
    }
  });
}

absl::Status Job::RemoveStrayPoints() {
  FileSystem& files = *environment_->files;
  const std::string parent = directory() + "/recovery";
  absl::Status removed = RemoveLeftovers(files, parent);
  if (absl::IsNotFound(removed)) return absl::OkStatus();
  GW_RETURN_IF_ERROR(removed);
  GW_ASSIGN_OR_RETURN(const auto names, files.List(parent));
  for (const std::string& name : names) {
    const bool known =
        std::any_of(points_.begin(), points_.end(), [&](const auto& point) {
          return std::to_string(point.number) == name;
        });
    if (known) continue;
    GW_RETURN_IF_ERROR(RemoveState(files, parent + "/" + name));
  }
  return absl::OkStatus();
}

}  // namespace gradwire
