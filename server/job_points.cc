// SPDX-License-Identifier: Apache-2.0
// Checkpoints that a recovery can begin with, so that it does not have to begin
// at the beginning, and what the log may let go for them. docs/recovery.md.
#include <algorithm>

#include "base/log.h"
#include "base/status.h"
#include "checkpoint/training_state.h"
#include "server/failpoint.h"
#include "server/job.h"
#include "server/journal_records.h"
#include "server/version.h"

namespace gradwire {
namespace {

// After a checkpoint that could not be written.
constexpr auto kPointPause = std::chrono::seconds(60);
constexpr size_t kMostPoints = 2;
// Results that nobody has acknowledged hold the log so far back.
constexpr int64_t kResultStoreBytes = int64_t{1} << 30;

}  // namespace

std::string Job::PointDirectory(const RecoveryPoint& point) const {
  return directory() + "/recovery/" + std::to_string(point.number);
}

bool Job::PointDue(const OperationPtr& op) const {
  if (spec_.forward_only() || Clock::now() < no_point_before_) return false;
  if (state_save_.flight.has_value() &&
      state_save_.flight->purpose == Flight::kSavePoint) {
    return false;
  }
  // A checkpoint that somebody saves takes its time; but not for ever.
  const int patience = state_save_.flight.has_value() ? 2 : 1;
  // What is loaded is kept for as long as it may be loaded again.
  if (op->loads) return true;
  if (op->kind != v1::OPERATION_KIND_OPTIM_STEP) return false;
  // Kept activations are not saved.
  for (const auto& [id, activation] : activations_) {
    if (activation.kept) return false;
  }
  return steps_since_point_ + 1 >=
             patience * environment_->auto_checkpoint_steps ||
         seconds_since_point_ >= patience * environment_->max_replay_seconds;
}

Job::Next Job::SavePoint() {
  Flight flight{.purpose = Flight::kSavePoint,
                .op = save_after_,
                .seconds = seconds_since_point_};
  save_after_ = nullptr;
  flight.point.number = next_point_++;
  const RecoveryPoint point = flight.point;
  Next next = Launch(std::move(flight));
  v1::RankSaveState& save = *next.request.command.mutable_save_state();
  save.set_directory(PointDirectory(point));
  auto& attributes = *save.mutable_attributes();
  attributes["base_model"] = spec_.base_model();
  attributes["precision"] = spec_.precision();
  attributes["version"] = kVersion;
  return next;
}

void Job::OnPointSaved(const Flight& flight, const v1::RankDone& done) {
  if (done.has_error()) {
    spdlog::warn("job {}: no checkpoint for its recovery could be written: {}",
                 id_, done.error().message());
    no_point_before_ = Clock::now() + kPointPause;
    return;
  }
  RecoveryPoint point = flight.point;
  point.optimizer_step = done.save_state().optimizer_step();
  point.weight_version = done.save_state().weight_version();
  // An operation that failed may have left gradients, which are not saved.
  const bool usable = flight.op->final_state == v1::OPERATION_STATE_DONE;
  // Of those that have ended while it was written, it knows nothing.
  steps_since_point_ =
      std::max<int64_t>(0, job_.optimizer_step() - point.optimizer_step);
  seconds_since_point_ = std::max(0.0, seconds_since_point_ - flight.seconds);
  references_.push_back({flight.op, point, usable});
  commit_work_.Signal();
}

int64_t Job::LogNeededFrom(int64_t from, int64_t replay_from) const {
  for (const OperationPtr& op : history_) {
    // The oldest checkpoint has it.
    if (op->outcome_at >= 0 && op->outcome_at < replay_from) continue;
    // The handle says what it attached, or began, with.
    if (op->kind == v1::OPERATION_KIND_UNSPECIFIED) continue;
    if (op->logged_at >= 0) from = std::min(from, op->logged_at);
  }
  const int64_t results_from = journal_->end() - kResultStoreBytes;
  for (const auto& [id, handle] : handles_) {
    handle->queue.Visit([&](const Operation& op) {
      if (!op.Final()) {
        if (op.logging) from = std::min(from, op.log_from);
        if (op.logged_at >= 0) from = std::min(from, op.logged_at);
        return;
      }
      const bool has_arrays = op.final_state == v1::OPERATION_STATE_DONE &&
                              !op.expired &&
                              (op.kind == v1::OPERATION_KIND_FORWARD ||
                               op.kind == v1::OPERATION_KIND_FORWARD_BACKWARD);
      if (has_arrays && op.outcome_at >= results_from) {
        from = std::min(from, op.outcome_at);
      }
    });
  }
  return from;
}

absl::Status Job::AddReference(const Reference& reference) {
  FileSystem& files = *environment_->files;
  if (!reference.usable) {
    return RemoveState(files, PointDirectory(*reference.point));
  }
  Failpoint("checkpoint.before_reference");
  Metadata::Reference row;
  std::vector<RecoveryPoint> points;
  std::vector<RecoveryPoint> old;
  std::vector<OperationPtr> operations;
  int64_t replay_from = 0;
  // Before it is known what is in use: what comes later is in use.
  const std::vector<std::string> loaded = ListLoaded();
  std::set<std::string> loads_in_use;
  {
    absl::MutexLock lock(&mu_);
    points = points_;
    if (reference.point.has_value()) {
      points.push_back(*reference.point);
      points.back().replay_from = reference.last->outcome_at + 1;
      while (points.size() > kMostPoints) {
        old.push_back(points.front());
        points.erase(points.begin());
      }
    }
    replay_from = points.empty() ? history_from_ : points.front().replay_from;
    // Without a checkpoint, what history names is all that is needed.
    row.log_begin = LogNeededFrom(
        points.empty() ? journal_->end() : replay_from, replay_from);
    operations.swap(unreferenced_);
    for (const auto& [id, handle] : handles_) {
      row.closed.emplace_back(handle->number, handle->closed_below);
    }
    referenced_at_ = journal_->end();
  }
  for (const OperationPtr& op : operations) {
    row.operations.push_back(
        {op->handle, op->seq, OutcomeOf(*op, false).SerializeAsString()});
  }
  if (reference.point.has_value()) {
    row.point = &points.back();
    row.oldest_point = points.front().number;
  }
  const absl::Status added = environment_->metadata->AddReference(id_, row);
  {
    absl::MutexLock lock(&mu_);
    if (!added.ok()) {
      unreferenced_.insert(unreferenced_.begin(), operations.begin(),
                           operations.end());
      return added;
    }
    points_ = points;
    if (!points.empty()) history_from_ = replay_from;
    while (!history_.empty() && history_.front()->outcome_at >= 0 &&
           history_.front()->outcome_at < replay_from) {
      history_.pop_front();
    }
    loads_in_use = LoadsInUse();
  }
  Failpoint("checkpoint.after_reference");
  RemoveStrayLoads(loaded, loads_in_use);
  for (const RecoveryPoint& point : old) {
    const absl::Status removed = RemoveState(files, PointDirectory(point));
    if (!removed.ok() && !absl::IsNotFound(removed)) return removed;
  }
  GW_RETURN_IF_ERROR(journal_->Trim(row.log_begin));
  Failpoint("checkpoint.after_trim");
  return absl::OkStatus();
}

void Job::RemoveDurableState() {
  FileSystem& files = *environment_->files;
  for (const std::string part : {"/log", "/recovery"}) {
    const auto names = files.List(directory() + part);
    if (!names.ok()) continue;
    for (const std::string& name : *names) {
      const std::string path = directory() + part + "/" + name;
      if (part == "/log") {
        files.Remove(path).IgnoreError();
      } else {
        RemoveState(files, path).IgnoreError();
      }
    }
    files.Remove(directory() + part).IgnoreError();
  }
  RemoveStrayLoads(ListLoaded(), {});
  files.Remove(directory() + "/loaded").IgnoreError();
  // Unless it has checkpoints or snapshots, which outlive their job.
  files.Remove(directory()).IgnoreError();
}

}  // namespace gradwire
