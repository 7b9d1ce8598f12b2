// SPDX-License-Identifier: Apache-2.0
// A job's life: its process, its state, who waits for it. The rest of the class
// is in job_*.cc.
#include "server/job.h"

#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "google/protobuf/util/time_util.h"
#include "server/grpc_status.h"
#include "server/rank_errors.h"

namespace gradwire {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(250);
// How long a job that is to be deleted waits for its saves.
constexpr std::chrono::seconds kSaveLimit{2700};

}  // namespace

Job::Job(std::string job_id, const v1::JobSpec& spec,
         JobEnvironment* environment)
    : id_(std::move(job_id)),
      spec_(spec),
      environment_(environment),
      started_(Clock::now()) {
  job_.set_job_id(id_);
  *job_.mutable_spec() = spec_;
  // As exactly as it is recorded.
  *job_.mutable_create_time() =
      google::protobuf::util::TimeUtil::MicrosecondsToTimestamp(
          absl::ToUnixMicros(absl::Now()));
  *job_.mutable_update_time() = WallNow();
  StartJob(job_);
}

Job::~Job() {
  Stop();
  if (executor_.joinable()) executor_.join();
  EndCommit();
  ranks_.reset();
}

void Job::EndCommit() {
  {
    // What has ended is recorded before the end.
    absl::MutexLock lock(&mu_);
    end_commit_ = true;
    commit_work_.Signal();
  }
  if (committer_.joinable()) committer_.join();
}

absl::Status Job::Create() {
  JobRow row;
  row.job_id = id_;
  row.spec = spec_.SerializeAsString();
  row.created_microseconds =
      google::protobuf::util::TimeUtil::TimestampToMicroseconds(
          job_.create_time());
  GW_RETURN_IF_ERROR(environment_->metadata->AddJob(row));
  absl::Status opened = OpenJournal(row);
  if (!opened.ok()) {
    // While the row is there, so that the next server finds what is left.
    RemoveDurableState();
    environment_->metadata->ForgetJob(id_).IgnoreError();
  }
  return opened;
}

std::shared_ptr<RankGroup> Job::ranks() const {
  absl::MutexLock lock(&mu_);
  return restart_due_ ? nullptr : ranks_;
}

void Job::Stop() {
  std::shared_ptr<RankGroup> ranks;
  {
    absl::MutexLock lock(&mu_);
    if (stopping_) return;
    stopping_ = true;
    ranks = ranks_;
    for (const auto& [id, handle] : handles_) {
      handle->queue.WakeAll();
      if (handle->reset != nullptr) handle->reset->changed.SignalAll();
    }
    for (const Flight& flight : in_flight_) {
      if (flight.op != nullptr) flight.op->changed.SignalAll();
    }
    for (const OperationPtr& op : again_) op->changed.SignalAll();
    for (const OperationPtr& op : control_) op->changed.SignalAll();
    work_.SignalAll();
    state_changed_.SignalAll();
  }
  if (ranks != nullptr) ranks->Stop();
}

bool Job::stopping() const {
  absl::MutexLock lock(&mu_);
  return stopping_;
}

void Job::Start() {
  committer_ = std::thread([this] { Commit(); });
  executor_ = std::thread([this] { Run(); });
  {
    absl::MutexLock lock(&mu_);
    if (job_.state() != v1::JOB_STATE_CREATING) {
      // It failed under an earlier server, or cannot be restored by this one.
      Tell(false);
      return;
    }
  }
  StartRanks();
}

void Job::StartRanks() {
  RankGroupOptions options;
  options.job_id = id_;
  options.world_size = world_size();
  if (environment_->external) {
    options.join_token = environment_->join_token;
  } else {
    options.join_token = RandomHex(32);
    options.rank_binary = environment_->rank_binary;
  }
  options.rank_address = environment_->rank_address;
  options.device = environment_->device;
  options.threads =
      spec_.threads() > 0 ? spec_.threads() : environment_->threads;
  options.rank_timeout = environment_->rank_timeout;
  options.metrics = environment_->metrics;
  auto ranks = std::make_shared<RankGroup>(
      options, [this](GroupEvent event) { OnRanks(std::move(event)); });
  {
    absl::MutexLock lock(&mu_);
    const bool recovers = job_.state() == v1::JOB_STATE_RUNNING &&
                          job_.phase() == v1::JOB_PHASE_RECOVERING;
    if (stopping_ || (job_.state() != v1::JOB_STATE_CREATING && !recovers)) {
      return;
    }
    ranks_ = ranks;
    ranks_ended_ = false;
  }
  Apply({JobEvent::kStarted});
  ranks->Start();
}

absl::StatusOr<v1::Job> Job::Restart() {
  std::shared_ptr<RankGroup> old;
  v1::Job restarted;
  {
    absl::MutexLock attach_lock(&attach_mu_);
    absl::MutexLock lock(&mu_);
    if (environment_->draining) return Draining();
    if (job_.state() != v1::JOB_STATE_FAILED) {
      const absl::Status unready = Unready();
      if (GetErrorDetail(unready).value_or(ErrorDetail()).reason ==
          "JOB_DELETED") {
        return unready;
      }
      return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                          "JOB_NOT_FAILED")
          .With("job_id", id_)
          .With("value", JobStateName(job_.state()))
          .With("limit", "failed")
          .Message("Only a failed job can be restarted; this one is " +
                   JobStateName(job_.state()) + ".");
    }
    // A log that broke is examined, and mended, by the next server.
    if (journal_broken_ || journal_ == nullptr) {
      return FromOperationError(job_.error());
    }
    GW_RETURN_IF_ERROR(environment_->metadata->FenceHandles(id_));
    GW_RETURN_IF_ERROR(
        environment_->metadata->SetJobState(id_, JobRow::kLive, ""));
    environment_->metrics->CountRestart(id_, RestartCause(job_.error()));
    for (auto& [id, handle] : handles_) handle->fenced = true;
    current_ = nullptr;
    started_ = Clock::now();
    Decide({JobEvent::kRestart}, job_);
    failures_in_row_ = 0;
    failure_ = absl::OkStatus();
    recovery_ = v1::Recovery();
    recovery_.set_cause("RESTARTED");
    recovery_began_ = Clock::now();
    recovering_ = !history_.empty() || !points_.empty();
    Tell(false);
    restarted = job_;
    while (!ranks_ended_) state_changed_.WaitWithTimeout(&mu_, kTick);
    old = std::move(ranks_);
    load_due_ = false;
    stage_ = Stage::kStarting;
  }
  // Its threads may be in a call of ours.
  old.reset();
  StartRanks();
  return restarted;
}

absl::Status Job::Delete() {
  // Before anything is ended: a server that starts without knowing it finds a
  // job that lives.
  GW_RETURN_IF_ERROR(
      environment_->metadata->SetJobState(id_, JobRow::kDeleted, ""));
  Apply({JobEvent::kDelete});
  {
    absl::MutexLock lock(&mu_);
    while (!ranks_ended_) state_changed_.WaitWithTimeout(&mu_, kTick);
  }
  Apply({JobEvent::kStopped});
  Stop();
  absl::MutexLock attach_lock(&attach_mu_);
  // It may be at the files of the job.
  if (executor_.joinable()) executor_.join();
  EndCommit();
  // What was recorded while it ended; if that fails, rows stay that nobody
  // reads.
  environment_->metadata->SetJobState(id_, JobRow::kDeleted, "").IgnoreError();
  // A parent would wait for its delta, and the disk for the next server.
  if (const absl::Status removed =
          environment_->catalogue().RemoveUnfinished(id_);
      !removed.ok()) {
    spdlog::warn("job {}: {}", id_, std::string(removed.message()));
  }
  RemoveDurableState();
  return absl::OkStatus();
}

absl::Status Job::AwaitSaves(const std::function<bool()>& given_up) {
  const Clock::time_point limit = Clock::now() + kSaveLimit;
  absl::MutexLock lock(&mu_);
  std::vector<OperationPtr> saves;
  for (const auto& [id, handle] : handles_) {
    handle->queue.Visit([&, &queue = handle->queue](const Operation& op) {
      if (IsSave(op.kind) && op.record.state() == v1::OPERATION_STATE_RUNNING) {
        saves.push_back(queue.Find(op.seq));
      }
    });
  }
  // Those that were interrupted, and begin again.
  for (const OperationPtr& op : again_) {
    if (IsSave(op->kind)) saves.push_back(op);
  }
  const auto runs = [](const OperationPtr& op) { return !op->Final(); };
  const auto lives = [&] {
    return job_.state() == v1::JOB_STATE_CREATING ||
           job_.state() == v1::JOB_STATE_PENDING ||
           job_.state() == v1::JOB_STATE_RUNNING;
  };
  // Of a job that has failed nothing goes on.
  while (std::any_of(saves.begin(), saves.end(), runs) && lives()) {
    if (environment_->draining || stopping_) return Draining();
    if (given_up()) return absl::CancelledError("the caller has gone");
    if (Clock::now() >= limit) {
      return ErrorBuilder(absl::StatusCode::kDeadlineExceeded, "SAVES_RUNNING")
          .With("job_id", id_)
          .With("value", std::count_if(saves.begin(), saves.end(), runs))
          .With("limit", kSaveLimit.count())
          .Message("Saves of the job have not ended in " +
                   std::to_string(kSaveLimit.count()) +
                   " s; nothing was deleted. Delete it with `force` to give "
                   "them up.");
    }
    state_changed_.WaitWithTimeout(&mu_, kTick);
  }
  return absl::OkStatus();
}

void Job::Changed() {
  ++version_;
  *job_.mutable_update_time() = WallNow();
  state_changed_.SignalAll();
  work_.SignalAll();
}

void Job::Apply(const JobEvent& event) {
  std::shared_ptr<RankGroup> to_stop;
  bool has_failed = false;
  std::string error;
  {
    absl::MutexLock lock(&mu_);
    const bool was_ready = job_.ready();
    const v1::JobState was = job_.state();
    if (event.kind == JobEvent::kProgress) {
      *job_.mutable_last_progress_time() = WallNow();
    }
    for (JobAction action : Decide(event, job_)) {
      switch (action) {
        case JobAction::kFailOperations:
          FailOperations();
          break;
        case JobAction::kStopRanks:
          to_stop = ranks_;
          break;
      }
    }
    Tell(was_ready);
    if (job_.state() != was && job_.state() == v1::JOB_STATE_FAILED) {
      has_failed = true;
      error = job_.error().SerializeAsString();
    }
  }
  if (has_failed) {
    const absl::Status known =
        environment_->metadata->SetJobState(id_, JobRow::kFailed, error);
    // The next server will try to recover it.
    if (!known.ok()) {
      spdlog::error("job {}: its failure is not recorded: {}", id_,
                    std::string(known.message()));
    }
  }
  if (to_stop != nullptr) to_stop->Stop();
}

void Job::Tell(bool was_ready) {
  if (job_.ready() && !was_ready) {
    job_.set_seconds_to_ready(
        std::chrono::duration<double>(Clock::now() - started_).count());
  }
  if (job_.state() == v1::JOB_STATE_FAILED) {
    spdlog::warn("job {} failed: {}: {}", id_, job_.status_reason(),
                 job_.status_message());
  }
  if (job_.state() == v1::JOB_STATE_DELETED) {
    environment_->metrics->RemoveJob(id_);
  } else {
    environment_->metrics->SetStep(id_, job_.optimizer_step());
    environment_->metrics->SetJobState(id_, JobStateName(job_.state()),
                                       JobPhaseName(job_.phase()));
  }
  if (environment_->on_change) environment_->on_change(job_);
  Changed();
}

v1::Job Job::Get() const {
  absl::MutexLock lock(&mu_);
  return job_;
}

bool Job::ready() const {
  absl::MutexLock lock(&mu_);
  return job_.ready();
}

bool Job::busy() const {
  absl::MutexLock lock(&mu_);
  for (const Flight& flight : in_flight_) {
    if (flight.purpose == Flight::kOperation) return true;
  }
  return IsSaving() || committing_ || !ended_.empty();
}

v1::Job Job::WaitForChange(int64_t& version, absl::Duration timeout) const {
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&mu_);
  while (version_ == version) {
    if (state_changed_.WaitWithDeadline(&mu_, deadline)) break;
  }
  version = version_;
  return job_;
}

absl::Status Job::Unready() const {
  if (job_.ready()) return absl::OkStatus();
  const bool lives = job_.state() == v1::JOB_STATE_CREATING ||
                     job_.state() == v1::JOB_STATE_PENDING ||
                     job_.state() == v1::JOB_STATE_RUNNING;
  if (recovering_ && lives) return absl::OkStatus();
  if (job_.state() == v1::JOB_STATE_FAILED) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "JOB_FAILED")
        .Server()
        .With("job_id", id_)
        .With("cause", job_.status_reason())
        .Message("The job has failed: " + job_.status_message());
  }
  if (job_.state() == v1::JOB_STATE_DELETING ||
      job_.state() == v1::JOB_STATE_DELETED) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "JOB_DELETED")
        .With("job_id", id_)
        .Message("The job was deleted. Create another.");
  }
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "JOB_NOT_READY")
      .Server()
      .With("job_id", id_)
      .With("value", JobPhaseName(job_.phase()))
      .With("limit", "ready")
      .Message("The job is not ready yet. Watch it until `ready` is set.");
}

absl::StatusOr<v1::Profile> Job::GetProfile() const {
  absl::MutexLock lock(&mu_);
  GW_RETURN_IF_ERROR(Unready());
  return profile_;
}

v1::Profile Job::LastProfile() const {
  absl::MutexLock lock(&mu_);
  return profile_;
}

}  // namespace gradwire
