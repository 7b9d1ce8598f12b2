// SPDX-License-Identifier: Apache-2.0
#include "server/job_state.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/error.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

bool IsEnded(v1::JobState state) {
  return state == v1::JOB_STATE_FAILED || state == v1::JOB_STATE_CANCELLED ||
         state == v1::JOB_STATE_COMPLETED || state == v1::JOB_STATE_DELETING ||
         state == v1::JOB_STATE_DELETED;
}

void Fail(const absl::Status& status, v1::Job& job) {
  job.set_state(v1::JOB_STATE_FAILED);
  job.set_ready(false);
  *job.mutable_error() = ToOperationError(status);
  job.set_status_reason(job.error().reason());
  job.set_status_message(job.error().message());
}

}  // namespace

void StartJob(v1::Job& job) {
  job.set_state(v1::JOB_STATE_CREATING);
  job.set_phase(v1::JOB_PHASE_PLACING);
  job.set_ready(false);
}

std::vector<JobAction> Decide(const JobEvent& event, v1::Job& job) {
  switch (event.kind) {
    case JobEvent::kStarted:
      if (job.state() == v1::JOB_STATE_CREATING) {
        job.set_state(v1::JOB_STATE_PENDING);
      }
      return {};
    case JobEvent::kRanksJoined: {
      if (IsEnded(job.state()) || job.state() == v1::JOB_STATE_RUNNING) {
        return {};
      }
      const bool all = event.joined == event.world_size;
      if (!all) {
        job.set_status_reason("RANKS_MISSING");
        job.set_status_message(absl::StrCat(
            event.joined, " of ", event.world_size, " ranks have come."));
      } else if (job.status_reason() == "RANKS_MISSING") {
        job.set_status_reason("");
        job.set_status_message("");
      }
      job.set_progress(static_cast<double>(event.joined) / event.world_size);
      return {};
    }
    case JobEvent::kProgress:
      if (IsEnded(job.state()) || job.ready()) return {};
      job.set_state(v1::JOB_STATE_RUNNING);
      job.set_phase(event.phase);
      job.set_progress(event.progress);
      return {};
    case JobEvent::kReady:
      if (IsEnded(job.state())) return {};
      if (job.phase() == v1::JOB_PHASE_RECOVERING) {
        job.clear_status_reason();
        job.clear_status_message();
      }
      job.set_state(v1::JOB_STATE_RUNNING);
      job.set_phase(v1::JOB_PHASE_READY);
      job.set_progress(1);
      job.set_ready(true);
      return {};
    case JobEvent::kRanksFailed:
      if (IsEnded(job.state())) return {};
      Fail(event.status, job);
      return {JobAction::kFailOperations, JobAction::kStopRanks};
    case JobEvent::kRecovering: {
      if (IsEnded(job.state())) return {};
      const v1::OperationError why = ToOperationError(event.status);
      job.set_state(v1::JOB_STATE_RUNNING);
      job.set_phase(v1::JOB_PHASE_RECOVERING);
      job.set_ready(false);
      job.set_progress(0);
      job.set_status_reason(why.reason());
      job.set_status_message(why.message());
      return {JobAction::kStopRanks};
    }
    case JobEvent::kRestart: {
      if (job.state() != v1::JOB_STATE_FAILED) return {};
      StartJob(job);
      job.clear_error();
      job.set_progress(0);
      job.clear_memory_use();
      job.clear_memory_use_max();
      job.clear_collective_use();
      job.set_seconds_to_ready(0);
      job.set_status_reason("RESTARTED");
      job.set_status_message(
          "The job starts again, and is put where its last executed operation "
          "left it. Attach to it anew.");
      return {};
    }
    case JobEvent::kDelete:
      if (job.state() == v1::JOB_STATE_DELETING ||
          job.state() == v1::JOB_STATE_DELETED) {
        return {};
      }
      job.set_state(v1::JOB_STATE_DELETING);
      job.set_ready(false);
      job.set_status_reason("DELETED");
      job.set_status_message("The job was deleted.");
      return {JobAction::kFailOperations, JobAction::kStopRanks};
    case JobEvent::kStopped:
      if (job.state() == v1::JOB_STATE_DELETING) {
        job.set_state(v1::JOB_STATE_DELETED);
      }
      return {};
  }
  return {};
}

std::string JobStateName(v1::JobState state) {
  return absl::AsciiStrToLower(
      absl::StripPrefix(v1::JobState_Name(state), "JOB_STATE_"));
}

std::string JobPhaseName(v1::JobPhase phase) {
  return absl::AsciiStrToLower(
      absl::StripPrefix(v1::JobPhase_Name(phase), "JOB_PHASE_"));
}

}  // namespace gradwire
