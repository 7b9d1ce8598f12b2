// SPDX-License-Identifier: Apache-2.0
// A job's life: its process, its state, who waits for it. See job_handles.cc,
// job_operations.cc and job_rank.cc for the rest of the class.
#include "server/job.h"

#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(250);

}  // namespace

Job::Job(std::string job_id, const v1::JobSpec& spec,
         JobEnvironment* environment)
    : id_(std::move(job_id)),
      spec_(spec),
      environment_(environment),
      token_(RandomHex(16)),
      created_(Clock::now()) {
  job_.set_job_id(id_);
  *job_.mutable_spec() = spec_;
  *job_.mutable_create_time() = WallNow();
  *job_.mutable_update_time() = WallNow();
  StartJob(job_);
}

Job::~Job() {
  Stop();
  if (executor_.joinable()) executor_.join();
  process_.reset();
}

void Job::Stop() {
  absl::MutexLock lock(&mu_);
  if (stopping_) return;
  stopping_ = true;
  FailOperations();
  if (process_ != nullptr) process_->Kill();
  work_.SignalAll();
  state_changed_.SignalAll();
}

void Job::Start() {
  std::vector<std::string> argv = {
      environment_->rank_binary, "--supervisor=" + environment_->rank_address,
      "--job_id=" + id_,
      "--threads=" + std::to_string(spec_.threads() > 0
                                        ? spec_.threads()
                                        : environment_->threads)};
  auto process = RankProcess::Start(
      argv, {{"GRADWIRE_JOIN_TOKEN", token_}}, [this](absl::Status status) {
        environment_->metrics->SetRankUp(id_, false);
        bool told = false;
        {
          absl::MutexLock lock(&mu_);
          process_ended_ = true;
          told = stopping_ || job_.state() == v1::JOB_STATE_DELETING;
          state_changed_.SignalAll();
        }
        if (told) {
          spdlog::info("job {}: its rank has stopped", id_);
        } else {
          Apply({JobEvent::kRankExited, {}, 0, status});
        }
      });
  if (!process.ok()) {
    {
      absl::MutexLock lock(&mu_);
      process_ended_ = true;
    }
    Apply({JobEvent::kStartFailed, {}, 0, process.status()});
    return;
  }
  {
    absl::MutexLock lock(&mu_);
    process_ = *std::move(process);
    // Deleted or stopped before there was a process to end.
    if (stopping_ || job_.state() == v1::JOB_STATE_DELETING) process_->Kill();
  }
  executor_ = std::thread([this] { Run(); });
  Apply({JobEvent::kStarted, {}, 0, absl::OkStatus()});
}

void Job::Delete() {
  Apply({JobEvent::kDelete, {}, 0, absl::OkStatus()});
  {
    absl::MutexLock lock(&mu_);
    while (!process_ended_) state_changed_.WaitWithTimeout(&mu_, kTick);
  }
  Apply({JobEvent::kStopped, {}, 0, absl::OkStatus()});
  Stop();
}

void Job::Changed() {
  ++version_;
  *job_.mutable_update_time() = WallNow();
  state_changed_.SignalAll();
  work_.SignalAll();
}

void Job::Apply(const JobEvent& event) {
  absl::MutexLock lock(&mu_);
  const bool was_ready = job_.ready();
  if (event.kind == JobEvent::kProgress) {
    *job_.mutable_last_progress_time() = WallNow();
  }
  for (JobAction action : Decide(event, job_)) {
    switch (action) {
      case JobAction::kFailOperations:
        FailOperations();
        break;
      case JobAction::kStopRank:
        if (process_ != nullptr) process_->Kill();
        break;
      case JobAction::kStartRank:
      case JobAction::kReportStopped:
        break;
    }
  }
  if (job_.ready() && !was_ready) {
    job_.set_seconds_to_ready(
        std::chrono::duration<double>(Clock::now() - created_).count());
  }
  if (job_.state() == v1::JOB_STATE_FAILED) {
    spdlog::warn("job {} failed: {}: {}", id_, job_.status_reason(),
                 job_.status_message());
  }
  if (job_.state() == v1::JOB_STATE_DELETED) {
    environment_->metrics->RemoveJob(id_);
  } else {
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
  return !in_flight_.empty();
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
