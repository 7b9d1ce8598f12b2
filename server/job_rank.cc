// SPDX-License-Identifier: Apache-2.0
// The ranks' side of a job: what is sent to them, in order, and what they
// report. What becomes of operations is in job_results.cc.
#include "base/log.h"
#include "server/failpoint.h"
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
    if (!failure_.ok() && job_.state() != v1::JOB_STATE_FAILED &&
        job_.state() != v1::JOB_STATE_DELETING &&
        job_.state() != v1::JOB_STATE_DELETED) {
      JobEvent failed{JobEvent::kRanksFailed};
      failed.status = failure_;
      recovering_ = false;
      restart_due_ = false;
      mu_.Unlock();
      Apply(failed);
      mu_.Lock();
      continue;
    }
    if (restart_due_ && RestartRanks()) continue;
    if (RecoveryEnded()) {
      // First ready, then no longer recovering: whoever looks in between finds
      // a job that takes operations, and how it was rebuilt.
      DescribeRecovery();
      mu_.Unlock();
      Apply({JobEvent::kReady, {}, 1});
      mu_.Lock();
      EndRecovery();
      continue;
    }
    std::optional<Next> next = TakeNext();
    if (!next.has_value()) {
      work_.WaitWithTimeout(&mu_, kTick);
      continue;
    }
    mu_.Unlock();
    Send(*std::move(next));
    mu_.Lock();
  }
  mu_.Unlock();
}

bool Job::RestartRanks() {
  if (!ranks_ended_ || Clock::now() < restart_at_) return false;
  restart_due_ = false;
  load_due_ = false;
  if (references_.empty() && !committing_) {
    if (absl::Status removed = RemoveStrayPoints(); !removed.ok()) {
      spdlog::warn("job {}: {}", id_, std::string(removed.message()));
    }
  }
  std::shared_ptr<RankGroup> old = std::move(ranks_);
  mu_.Unlock();
  // Its threads may be in a call of ours.
  old.reset();
  StartRanks();
  mu_.Lock();
  return true;
}

std::optional<Job::Next> Job::TakeNext() {
  if (load_due_) {
    load_due_ = false;
    Next next;
    next.load = true;
    next.id = next_command_++;
    return next;
  }
  for (Save* save : {&state_save_, &snapshot_save_}) {
    if (MayEndSave(*save)) return EndSave(*save);
  }
  if (stage_ == Stage::kLoadPoint || stage_ == Stage::kReplay) {
    const bool may = in_flight_.size() < kMaxInFlight && !SavesSuspect();
    return may ? NextReplay() : std::nullopt;
  }
  // The ranks' failure is known before the job's state says so.
  if (stage_ != Stage::kRunning || !job_.ready()) return std::nullopt;
  // What has killed a rank runs alone.
  if (SavesSuspect()) return std::nullopt;
  for (const Flight& flight : in_flight_) {
    if (flight.op != nullptr && flight.op->crashes > 0) return std::nullopt;
  }
  if (save_after_ != nullptr) {
    // A save that has not ended begins again with what came before it, and so
    // with no later point; and only one checkpoint is written at a time.
    return IsSaving() ? std::nullopt : std::optional<Next>(SavePoint());
  }
  if (again_.empty() && !control_.empty() && !WaitsForSave(*control_.front())) {
    OperationPtr op = control_.front();
    control_.pop_front();
    return Begin(op);
  }
  if (in_flight_.size() >= kMaxInFlight) return std::nullopt;
  if (!again_.empty()) {
    const OperationPtr op = again_.front();
    if (!MayBeginBeside(*op) || WaitsForSave(*op)) return std::nullopt;
    again_.pop_front();
    return Begin(op);
  }
  if (current_ == nullptr || !control_.empty() ||
      WaitsForSave(current_->queue)) {
    return std::nullopt;
  }
  OperationPtr op = current_->queue.TakeNext();
  if (op == nullptr) return std::nullopt;
  return Begin(op);
}

Job::Next Job::Launch(Flight flight) {
  Next next;
  next.id = next_command_++;
  flight.id = next.id;
  if (flight.saves()) {
    SaveOf(flight).flight = std::move(flight);
  } else {
    in_flight_.push_back(std::move(flight));
  }
  return next;
}

Job::Next Job::Begin(const OperationPtr& op) {
  const bool released = op->handle == 0;
  Next next =
      Launch({.purpose = released ? Flight::kRelease : Flight::kOperation,
              .op = op,
              .known_items = op->logprobs.size()});
  if (op->request.command.command_case() != v1::RankCommand::COMMAND_NOT_SET) {
    next.request = std::move(op->request);
    op->request = OperationRequest();
  } else if (const auto handle = FindHandle(op->model_id);
             op->kind == v1::OPERATION_KIND_UNSPECIFIED && handle.ok()) {
    next.request = std::move(ResetOf(**handle)->request);
  } else {
    next.read_at = op->logged_at;
  }
  next.shapes = op->shapes;
  next.rank_of = op->rank_of;
  if (op->loads) next.kept_at = KeptAt(*op);
  op->started = Clock::now();
  op->record.set_state(v1::OPERATION_STATE_RUNNING);
  *op->record.mutable_start_time() = WallNow();
  op->changed.SignalAll();
  if (auto it = activations_.find(op->activation_id);
      it != activations_.end()) {
    it->second.kept = op->kind == v1::OPERATION_KIND_FORWARD;
  }
  if (PointDue(op)) save_after_ = op;
  if (op->kind != v1::OPERATION_KIND_UNSPECIFIED && current_ != nullptr) {
    environment_->metrics->SetQueue(id_, current_->queue.queued(),
                                    current_->queue.queued_bytes());
  }
  return next;
}

Dispatch Job::LoadModel(int64_t id) const {
  v1::JobSpec spec = spec_;
  if (spec.precision().empty()) {
    // The default of the device that it began on.
    absl::MutexLock lock(&mu_);
    spec.set_precision(profile_.precision());
  }
  Dispatch dispatch;
  for (int rank = 0; rank < world_size(); ++rank) {
    v1::RankCommand& command = dispatch.own.emplace_back().emplace_back();
    command.set_command_id(id);
    v1::RankLoad& load = *command.mutable_load();
    *load.mutable_spec() = spec;
    load.set_job_id(id_);
    load.set_rank(rank);
    load.set_world_size(world_size());
    load.set_collective_timeout_seconds(
        absl::ToDoubleSeconds(environment_->collective_timeout));
    load.set_snapshot_shard_bytes(environment_->snapshot_shard_bytes);
    load.set_epoch_directory(environment_->epoch_directory);
    load.set_epoch(environment_->metadata->epoch());
  }
  absl::MutexLock lock(&mu_);
  for (const KernelChoicesRow& row : choices_) {
    dispatch.own[static_cast<size_t>(row.rank)]
        .back()
        .mutable_load()
        ->add_choices(row.choices);
  }
  return dispatch;
}

void Job::Send(Next next) {
  const std::shared_ptr<RankGroup> ranks = this->ranks();
  if (ranks == nullptr) return;
  if (next.load) {
    ranks->Send(LoadModel(next.id));
    return;
  }
  if (next.read_at >= 0) {
    auto entry = journal_->Read(next.read_at);
    if (!entry.ok()) {
      BreakJournal(entry.status());
      return;
    }
    v1::JournalOp& op = *entry->op;
    next.request.command.Swap(op.mutable_command());
    for (v1::DatumChunk& chunk : *op.mutable_datums()) {
      next.request.datums.emplace_back().Swap(&chunk);
    }
    for (v1::GradientChunk& chunk : *op.mutable_gradients()) {
      next.request.gradients.emplace_back().Swap(&chunk);
    }
  }
  if (next.request.command.has_end_save()) {
    // What appears on the disk, a log that comes through a power loss knows of;
    // and of all that came before it.
    if (absl::Status synced = journal_->Sync(); !synced.ok()) {
      BreakJournal(synced);
      return;
    }
  }
  if (!next.kept_at.empty() && next.request.command.has_load_state()) {
    const absl::Status kept =
        KeepLoaded(next, *next.request.command.mutable_load_state());
    if (!kept.ok()) {
      Refuse(next.id, kept);
      return;
    }
  }
  Failpoint("op.before_execute");
  ranks->Send(ShareRequest(std::move(next.request), next.shapes, next.rank_of,
                           world_size(), next.id));
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
    case GroupEvent::kProgress: {
      v1::JobPhase phase = event.progress.phase();
      {
        absl::MutexLock lock(&mu_);
        if (recovering_) phase = v1::JOB_PHASE_RECOVERING;
        if (event.progress.has_memory()) {
          *job_.mutable_memory() = event.progress.memory();
          environment_->metrics->SetMemory(id_, event.progress.memory());
        }
      }
      Apply({JobEvent::kProgress, phase, event.progress.progress()});
      return;
    }
    case GroupEvent::kChoices: {
      absl::MutexLock lock(&mu_);
      choices_.push_back({event.rank, std::move(event.choices)});
      return;
    }
    case GroupEvent::kReady: {
      bool is_new = false, recovers = false;
      std::string ready;
      {
        absl::MutexLock lock(&mu_);
        ready = event.ready.SerializeAsString();
        is_new = ready != known_ready_;
        known_ready_ = ready;
        profile_ = event.ready.profile();
        quadratic_ = event.ready.quadratic();
        kernels_ = event.ready.kernels();
        *job_.mutable_memory() = event.ready.memory();
        job_.set_device(profile_.device());
        recovers = recovering_;
      }
      if (is_new) {
        const absl::Status known =
            environment_->metadata->SetProfile(id_, ready);
        if (!known.ok()) {
          spdlog::warn("job {}: its profile is not recorded: {}", id_,
                       std::string(known.message()));
        }
      }
      if (!recovers) {
        {
          absl::MutexLock lock(&mu_);
          stage_ = Stage::kRunning;
        }
        Apply({JobEvent::kReady, {}, 1});
        return;
      }
      Apply({JobEvent::kProgress, v1::JOB_PHASE_RECOVERING, 0});
      absl::MutexLock lock(&mu_);
      BeginRecovery();
      work_.SignalAll();
      return;
    }
    case GroupEvent::kLogprobs: {
      absl::MutexLock lock(&mu_);
      OnLogprobs(event);
      return;
    }
    case GroupEvent::kDone: {
      Failpoint("op.after_execute");
      absl::MutexLock lock(&mu_);
      OnDone(event);
      return;
    }
    case GroupEvent::kFailed:
      OnRanksFailed(event.status);
      return;
    case GroupEvent::kEnded: {
      absl::MutexLock lock(&mu_);
      ranks_ended_ = true;
      state_changed_.SignalAll();
      work_.SignalAll();
      return;
    }
  }
}

}  // namespace gradwire
