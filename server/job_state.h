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
    kStarted,      // the rank's process runs
    kStartFailed,  // it could not be started: `status`
    kProgress,     // `phase`, `progress`
    kReady,        // the first forward would succeed
    kModelFailed,  // the rank cannot serve the model: `status`
    kRankExited,   // the rank's process is gone: `status`
    kDelete,       // a client asked
    kStopped,      // after kStopRank: no process is left
  };
  Kind kind;
  v1::JobPhase phase = v1::JOB_PHASE_UNSPECIFIED;
  double progress = 0;
  absl::Status status;
};

// What the owner of the job must do, in order.
enum class JobAction {
  kStartRank,
  kStopRank,
  kFailOperations,  // all of them, with the job's error
  kReportStopped,   // there is no process: send kStopped
};

// Changes `job` (state, phase, ready, progress, reason, error) by `event`.
// Events that come too late for the state change nothing. Times are the
// caller's.
std::vector<JobAction> Decide(const JobEvent& event, v1::Job& job);

// A new job: CREATING. The first action is kStartRank.
void StartJob(v1::Job& job);

// "running"; "ready".
std::string JobStateName(v1::JobState state);
std::string JobPhaseName(v1::JobPhase phase);

}  // namespace gradwire
