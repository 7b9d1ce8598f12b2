// SPDX-License-Identifier: Apache-2.0
// What can befall a rank, as errors: reason, rank and cause for programs, and
// what to do for people.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gradwire/v1/operations.pb.h"

namespace gradwire {

// ABORTED RANK_EXITED with signal or exit_code; `wait_status` as of waitpid.
absl::Status RankExited(int rank, int wait_status);
// ABORTED RANK_HUNG: no heartbeat for this long.
absl::Status RankHung(int rank, absl::Duration silence);
// ABORTED RANK_LOST: its stream has ended.
absl::Status RankLost(int rank);
// ABORTED with the reason of `report`, COLLECTIVE_TIMEOUT or
// COLLECTIVE_FAILED: rank `reporter` says so of rank `rank`.
absl::Status RankBlamed(int rank, int reporter, const absl::Status& report);

// Whether an error of a rank is about its peers: COLLECTIVE_*.
bool IsCollectiveFailure(const absl::Status& status);

// What gradwire_job_restarts_total calls the failure that made a restart
// necessary: rank_exit, rank_signal, hang, oom, node, storage, operator.
std::string RestartCause(const v1::OperationError& failure);

}  // namespace gradwire
