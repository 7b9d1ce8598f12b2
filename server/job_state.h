// SPDX-License-Identifier: Apache-2.0
// The life of a job as one pure function.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gradwire/v1/jobs.pb.h"

namespace gradwire {

// What can happen to a job.
struct JobEvent {
  enum Kind {
    kStarted,      // its ranks are under way
    kRanksJoined,  // `joined` of `world_size` ranks are there
    kProgress,     // `phase`, `progress`
    kReady,        // the first forward would succeed
    kRanksFailed,  // they cannot start, or load, or go on: `status`
    kRecovering,   // as kRanksFailed, but they start again: `status`
    kRestart,      // a client asked; the job has failed, and no rank is left
    kDelete,       // a client asked
    kStopped,      // after kStopRanks: no rank is left
  };
  Kind kind;
  v1::JobPhase phase = v1::JOB_PHASE_UNSPECIFIED;
  double progress = 0;
  absl::Status status = absl::OkStatus();
  int joined = 0, world_size = 1;
};

// What the owner of the job must do, in order.
enum class JobAction {
  kFailOperations,  // all of them, with the job's error
  kStopRanks,
};

// Changes `job` (state, phase, ready, progress, reason, error) by `event`.
// Events that come too late for the state change nothing. Times are the
// caller's.
std::vector<JobAction> Decide(const JobEvent& event, v1::Job& job);

// A new job: CREATING.
void StartJob(v1::Job& job);

// "running"; "ready".
std::string JobStateName(v1::JobState state);
std::string JobPhaseName(v1::JobPhase phase);

}  // namespace gradwire
