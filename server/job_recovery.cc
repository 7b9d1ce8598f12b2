// SPDX-License-Identifier: Apache-2.0
// How a job's state comes back: ranks that have failed start again, load the
// newest checkpoint that is whole, and run what the log says they had run,
// each operation to the same result. docs/recovery.md.
#include <algorithm>

#include "absl/strings/escaping.h"
#include "base/error.h"
#include "base/log.h"
#include "server/grpc_status.h"
#include "server/job.h"
#include "server/rank_errors.h"
#include "server/replay_check.h"
#include "server/result_digest.h"

namespace gradwire {
namespace {

// An operation may kill so many times before it is given up.
constexpr int kMostCrashes = 3;
// Ranks that have lived so long after a recovery did not fail because of it.
constexpr auto kSound = std::chrono::seconds(60);
constexpr auto kFirstPause = std::chrono::milliseconds(100);
constexpr int kMostDoublings = 6;

// By itself, rather than by somebody who kills ranks.
bool IsCrash(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  if (!detail || detail->reason != "RANK_EXITED") return false;
  const auto signal = detail->metadata.find("signal");
  if (signal == detail->metadata.end()) return true;
  return signal->second != "9" && signal->second != "15";
}

absl::Status Crashed(const OperationPtr& op, const absl::Status& status) {
  ErrorBuilder error(absl::StatusCode::kInternal, "OP_CRASHED_WORKER");
  error.Server().With("seq_id", op->seq).With("limit", kMostCrashes);
  for (const auto& [key, value] :
       GetErrorDetail(status).value_or(ErrorDetail()).metadata) {
    error.With(key, value);
  }
  return error.Message(
      "A rank has crashed each of the " + std::to_string(kMostCrashes) +
      " times that it ran this operation. It is not applied and not run "
      "again; the model is as it was before. Report it with the rank's log.");
}

}  // namespace

// ---- Failure ---------------------------------------------------------------

bool Job::MayRecover(const absl::Status& status) const {
  if (stopping_ || !(job_.ready() || recovering_) || !failure_.ok() ||
      failures_in_row_ >= environment_->max_recoveries) {
    return false;
  }
  // What a rank cannot load now, it will not load the next time.
  const auto detail = GetErrorDetail(status);
  return !detail || detail->category == ErrorCategory::kServer ||
         detail->reason.rfind("RANK_", 0) == 0 || IsCollectiveFailure(status);
}

void Job::OnRanksFailed(const absl::Status& status) {
  bool recovers = false;
  {
    absl::MutexLock lock(&mu_);
    if (job_.ready() && Clock::now() - recovery_ended_ > kSound) {
      failures_in_row_ = 0;
    }
    recovers = MayRecover(status);
    restart_due_ = recovers;
    if (recovers) {
      if (!recovering_) {
        recovery_ = v1::Recovery();
        recovery_.set_cause(ToOperationError(status).reason());
        recovery_began_ = Clock::now();
      }
      TakeBackFlights(status);
      recovering_ = true;
      stage_ = Stage::kStarting;
      restart_at_ = Clock::now();
      if (failures_in_row_ > 0) {
        restart_at_ +=
            kFirstPause * (1 << std::min(failures_in_row_, kMostDoublings));
      }
      ++failures_in_row_;
      job_.set_recoveries(job_.recoveries() + 1);
      environment_->metrics->CountRestart(
          id_, RestartCause(ToOperationError(status)));
      spdlog::warn("job {}: {}; recovering", id_,
                   std::string(status.message()));
    } else {
      recovering_ = false;
    }
  }
  JobEvent event{recovers ? JobEvent::kRecovering : JobEvent::kRanksFailed};
  event.status = status;
  Apply(event);
}

void Job::TakeBackFlights(const absl::Status& status) {
  const bool crash = IsCrash(status);
  const auto take = [&](const OperationPtr& op) {
    op->is_again = true;
    again_.push_back(op);
  };
  // Which of several it was is seen when each runs alone.
  const auto take_suspect = [&](const OperationPtr& op) {
    if (crash && ++op->crashes >= kMostCrashes) {
      Finish(op, v1::OPERATION_STATE_FAILED, Crashed(op, status));
    } else {
      take(op);
    }
  };
  for (const Save* save : {&state_save_, &snapshot_save_}) {
    // Unless its second command is in flight.
    if (save->flight.has_value() &&
        save->flight->purpose == Flight::kOperation &&
        (save->flight->id != 0 || save->end.has_value())) {
      take_suspect(save->flight->op);
    }
  }
  bool first = true;
  for (const Flight& flight : in_flight_) {
    if (flight.purpose != Flight::kOperation) continue;
    if (first) {
      take_suspect(flight.op);
    } else {
      take(flight.op);
    }
    first = false;
  }
  // Releases of activations that are gone with their ranks are done.
  for (const OperationPtr& op : control_) {
    if (op->handle != 0) take(op);
  }
  control_.clear();
  // A handle attaches as its number 0: after all of the one before it.
  std::sort(again_.begin(), again_.end(), [](const auto& a, const auto& b) {
    return std::pair(a->handle, a->seq) < std::pair(b->handle, b->seq);
  });
  DropSaves();
  in_flight_.clear();
  save_after_ = nullptr;
}

// ---- Recovery --------------------------------------------------------------

void Job::Break(const absl::Status& status) {
  if (!failure_.ok()) return;
  failure_ = status;
  stage_ = Stage::kStarting;
  work_.SignalAll();
}

void Job::BeginRecovery() {
  recovery_.set_replayed_ops(0);
  recovery_.set_fidelity(v1::REPLAY_FIDELITY_BIT_IDENTICAL);
  point_index_ = static_cast<int64_t>(points_.size()) - 1;
  replay_next_ = 0;
  stage_ = point_index_ >= 0 ? Stage::kLoadPoint : Stage::kReplay;
  if (stage_ == Stage::kReplay) recovery_.set_restored_from("base model");
}

std::optional<Job::Next> Job::NextReplay() {
  if (stage_ == Stage::kLoadPoint) {
    if (!in_flight_.empty()) return std::nullopt;
    const RecoveryPoint& point = points_[static_cast<size_t>(point_index_)];
    Next next = Launch({.purpose = Flight::kLoadPoint, .point = point});
    v1::RankLoadState& load = *next.request.command.mutable_load_state();
    load.set_directory(PointDirectory(point));
    load.set_optimizer(true);
    return next;
  }
  while (replay_next_ < history_.size()) {
    const OperationPtr op = history_[replay_next_];
    if (const OperationPtr save = SaveBefore(op); save != nullptr) {
      if (!MayBeginBeside(*save)) return std::nullopt;
      again_.pop_front();
      return Begin(save);
    }
    ++replay_next_;
    if (!NeedsReplay(op)) continue;
    Next next = Launch({.purpose = Flight::kReplay, .op = op});
    if (op->loads) {
      next.kept_at = KeptAt(*op);
      next.replays = true;
    }
    if (op->kind == v1::OPERATION_KIND_UNSPECIFIED) {
      const auto handle = FindHandle(op->model_id);
      next.request.command.mutable_reset();
      if (handle.ok()) next.request = std::move(ResetOf(**handle)->request);
    } else if (op->final_state == v1::OPERATION_STATE_DONE) {
      // One that the log does not have is an error of it.
      next.read_at = std::max<int64_t>(0, op->logged_at);
      next.shapes = op->shapes;
      next.rank_of = op->rank_of;
    } else if (op->tainted) {
      next.request.command.mutable_taint();
    } else {
      next.request.command.mutable_zero_grad();
    }
    return next;
  }
  return std::nullopt;
}

bool Job::MayBeginBeside(const Operation& op) const {
  return op.crashes == 0 || (in_flight_.empty() && !IsSaving());
}

OperationPtr Job::SaveBefore(const OperationPtr& op) const {
  if (again_.empty()) return nullptr;
  const OperationPtr save = again_.front();
  // A handle that has taken over comes after all of the one before it.
  if (save->Ended() || !IsSave(save->kind) ||
      std::pair(save->handle, save->seq) > std::pair(op->handle, op->seq)) {
    return nullptr;
  }
  return save;
}

bool Job::ChangesState(const Operation& op) {
  if (!op.ran || IsSave(op.kind)) return false;
  if (op.final_state != v1::OPERATION_STATE_DONE) {
    // Its gradients, or that there are none any more.
    return op.tainted || op.kind == v1::OPERATION_KIND_OPTIM_STEP;
  }
  return op.kind != v1::OPERATION_KIND_FORWARD || !op.activation_id.empty();
}

bool Job::NeedsReplay(const OperationPtr& op) const {
  // Older than the state that was loaded.
  if (point_index_ >= 0 && op->outcome_at >= 0 &&
      op->outcome_at < points_[static_cast<size_t>(point_index_)].replay_from) {
    return false;
  }
  if (op->kind != v1::OPERATION_KIND_FORWARD) return true;
  // Only for the activations that somebody uses.
  if (activations_.count(op->activation_id) != 0) return true;
  return std::any_of(history_.begin(), history_.end(),
                     [&](const OperationPtr& other) {
                       return other->kind == v1::OPERATION_KIND_BACKWARD &&
                              other->activation_id == op->activation_id &&
                              other->final_state == v1::OPERATION_STATE_DONE;
                     });
}

void Job::OnPointLoaded(const Flight& flight, const v1::RankDone& done) {
  if (!done.has_error()) {
    recovery_.set_restored_from("checkpoint of step " +
                                std::to_string(flight.point.optimizer_step));
    stage_ = Stage::kReplay;
    return;
  }
  spdlog::warn("job {}: checkpoint {} of its recovery cannot be used: {}", id_,
               PointDirectory(flight.point), done.error().message());
  recovery_.set_damaged_checkpoints(recovery_.damaged_checkpoints() + 1);
  if (--point_index_ >= 0) return;
  if (history_from_ == 0) {
    recovery_.set_restored_from("base model");
    stage_ = Stage::kReplay;
    return;
  }
  Break(FromOperationError(done.error()));
}

void Job::OnReplayed(const Flight& flight, const v1::RankDone& done) {
  const Operation& op = *flight.op;
  recovery_.set_replayed_ops(recovery_.replayed_ops() + 1);
  job_.set_progress(static_cast<double>(replay_next_) /
                    static_cast<double>(history_.size()));
  Changed();
  if (op.final_state != v1::OPERATION_STATE_DONE) return;
  std::string had = op.state_digest, has;
  if (done.has_error()) {
    has = done.error().reason();
  } else {
    has = ResultDigest(done, flight.items);
  }
  if (!done.has_error() && (had.empty() || had == has)) return;
  // Behind the first operation that other kernels have rounded in another way,
  // the same kernels too run on another state.
  const bool may_differ =
      op.kernels != kernels_ ||
      recovery_.fidelity() == v1::REPLAY_FIDELITY_WITHIN_TOLERANCE;
  if (may_differ && IsWithinTolerance(op.record, op.weight_version,
                                      op.optimizer_step, done)) {
    if (recovery_.fidelity() != v1::REPLAY_FIDELITY_WITHIN_TOLERANCE) {
      spdlog::warn(
          "job {}: {} was run by other kernels, and differs within the "
          "tolerance: {} then, {} now",
          id_, op.op_id, op.kernels, kernels_);
    }
    recovery_.set_fidelity(v1::REPLAY_FIDELITY_WITHIN_TOLERANCE);
    return;
  }
  Break(
      ErrorBuilder(absl::StatusCode::kDataLoss, "REPLAY_DIVERGED")
          .Server()
          .With("op_id", op.op_id)
          .With("step", done.optimizer_step())
          .With("value", done.has_error() ? has : absl::BytesToHexString(has))
          .With("limit", absl::BytesToHexString(had))
          .Message(
              "Running the logged operations again gave another result than "
              "the first time, at " +
              KindName(op.kind) + " " + std::to_string(op.seq) +
              ". The job has stopped, and checkpoints and log are kept. Load a "
              "saved state into a new job."));
}

bool Job::RecoveryEnded() const {
  return stage_ == Stage::kReplay && in_flight_.empty() &&
         replay_next_ >= history_.size() && !restart_due_;
}

void Job::DescribeRecovery() {
  recovery_.set_optimizer_step(job_.optimizer_step());
  recovery_.set_seconds(
      std::chrono::duration<double>(Clock::now() - recovery_began_).count());
  *job_.mutable_last_recovery() = recovery_;
  spdlog::info(
      "job {}: recovered after {} in {:.2f} s from the {}, {} "
      "operations run again, optimizer step {}",
      id_, recovery_.cause(), recovery_.seconds(), recovery_.restored_from(),
      recovery_.replayed_ops(), job_.optimizer_step());
}

void Job::EndRecovery() {
  // Ranks may have failed since it was seen.
  if (!RecoveryEnded()) return;
  stage_ = Stage::kRunning;
  recovering_ = false;
  recovery_ended_ = Clock::now();
}

}  // namespace gradwire
