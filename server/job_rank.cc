// SPDX-License-Identifier: Apache-2.0
// The ranks' side of a job: what is sent to them, in order, and what they
// report. What becomes of operations is in job_results.cc.
#include "base/log.h"
#include "server/job.h"

namespace gradwire {
namespace {

constexpr size_t kMaxInFlight = 2;
constexpr absl::Duration kTick = absl::Milliseconds(250);

}  // namespace

// ---- The executor ----------------------------------------------------------

void Job::Run() {
  mu_.Lock();
  while (!stopping_) {
    Housekeep(Clock::now());
    const std::optional<Dispatch> next = NextDispatch();
    if (!next.has_value()) {
      work_.WaitWithTimeout(&mu_, kTick);
      continue;
    }
    std::shared_ptr<RankGroup> ranks = ranks_;
    mu_.Unlock();
    ranks->Send(*next);
    ranks.reset();
    mu_.Lock();
  }
  mu_.Unlock();
}

std::optional<Dispatch> Job::NextDispatch() {
  if (load_due_) {
    load_due_ = false;
    return Load();
  }
  if (!job_.ready()) return std::nullopt;
  if (!control_.empty()) {
    OperationPtr op = control_.front();
    control_.pop_front();
    return Begin(op);
  }
  if (current_ == nullptr || in_flight_.size() >= kMaxInFlight) {
    return std::nullopt;
  }
  OperationPtr op = current_->queue.TakeNext();
  if (op == nullptr) return std::nullopt;
  return Begin(op);
}

Dispatch Job::Load() {
  Dispatch dispatch;
  const int64_t id = next_command_++;
  for (int rank = 0; rank < world_size(); ++rank) {
    v1::RankCommand& command = dispatch.own.emplace_back().emplace_back();
    command.set_command_id(id);
    v1::RankLoad& load = *command.mutable_load();
    *load.mutable_spec() = spec_;
    load.set_job_id(id_);
    load.set_rank(rank);
    load.set_world_size(world_size());
    load.set_collective_timeout_seconds(
        absl::ToDoubleSeconds(environment_->collective_timeout));
  }
  return dispatch;
}

Dispatch Job::Begin(const OperationPtr& op) {
  const int64_t id = next_command_++;
  Dispatch dispatch = ShareRequest(std::move(op->request), op->shapes,
                                   op->rank_of, world_size(), id);
  op->request = OperationRequest();
  op->started = Clock::now();
  op->record.set_state(v1::OPERATION_STATE_RUNNING);
  *op->record.mutable_start_time() = WallNow();
  op->changed.SignalAll();
  in_flight_.emplace_back(id, op);
  if (op->kind != v1::OPERATION_KIND_UNSPECIFIED && current_ != nullptr) {
    environment_->metrics->SetQueue(id_, current_->queue.queued(),
                                    current_->queue.queued_bytes());
  }
  return dispatch;
}

// ---- The ranks -------------------------------------------------------------

void Job::OnRanks(GroupEvent event) {
  switch (event.kind) {
    case GroupEvent::kJoined: {
      JobEvent joined{JobEvent::kRanksJoined};
      joined.joined = event.joined;
      joined.world_size = world_size();
      Apply(joined);
      if (event.joined < world_size()) return;
      absl::MutexLock lock(&mu_);
      load_due_ = true;
      work_.SignalAll();
      return;
    }
    case GroupEvent::kProgress:
      if (event.progress.has_memory()) {
        absl::MutexLock lock(&mu_);
        *job_.mutable_memory() = event.progress.memory();
        environment_->metrics->SetMemory(id_, event.progress.memory());
      }
      Apply({JobEvent::kProgress, event.progress.phase(),
             event.progress.progress()});
      return;
    case GroupEvent::kReady: {
      {
        absl::MutexLock lock(&mu_);
        profile_ = event.ready.profile();
        quadratic_ = event.ready.quadratic();
        *job_.mutable_memory() = event.ready.memory();
        job_.set_device(profile_.device());
      }
      Apply({JobEvent::kReady, {}, 1});
      return;
    }
    case GroupEvent::kLogprobs: {
      absl::MutexLock lock(&mu_);
      OnLogprobs(event);
      return;
    }
    case GroupEvent::kDone: {
      absl::MutexLock lock(&mu_);
      OnDone(event);
      return;
    }
    case GroupEvent::kFailed:
      Apply({JobEvent::kRanksFailed, {}, 0, event.status});
      return;
    case GroupEvent::kEnded: {
      absl::MutexLock lock(&mu_);
      ranks_ended_ = true;
      state_changed_.SignalAll();
      return;
    }
  }
}

}  // namespace gradwire
