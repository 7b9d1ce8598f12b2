// SPDX-License-Identifier: Apache-2.0
#include "server/rank_errors.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "absl/strings/match.h"
#include "base/error.h"

namespace gradwire {
namespace {

constexpr char kLost[] =
    " When the job's ranks start again, what they had executed is rebuilt from "
    "its log.";

std::string Name(int rank) { return "Rank " + std::to_string(rank); }

}  // namespace

absl::Status RankExited(int rank, int wait_status) {
  ErrorBuilder error(absl::StatusCode::kAborted, "RANK_EXITED");
  error.Server().With("rank", rank);
  std::string how;
  if (WIFSIGNALED(wait_status)) {
    const int signal = WTERMSIG(wait_status);
    error.With("signal", signal);
    how = "was ended by signal " + std::to_string(signal) + " (" +
          strsignal(signal) + ")";
    if (signal == SIGKILL) {
      how += "; if nobody sent it, the machine ran out of memory";
    }
  } else {
    error.With("exit_code", WEXITSTATUS(wait_status));
    how = "ended with status " + std::to_string(WEXITSTATUS(wait_status));
  }
  return error.Message(Name(rank) + "'s process " + how + "." + kLost);
}

absl::Status RankHung(int rank, absl::Duration silence) {
  ErrorBuilder error(absl::StatusCode::kAborted, "RANK_HUNG");
  return error.Server()
      .With("rank", rank)
      .With("seconds", absl::ToDoubleSeconds(silence))
      .Message(Name(rank) + " has given no sign of life for " +
               absl::FormatDuration(absl::Floor(silence, absl::Seconds(1))) +
               ": it is stopped, or its machine is, or cannot be reached." +
               kLost);
}

absl::Status RankLost(int rank) {
  return ErrorBuilder(absl::StatusCode::kAborted, "RANK_LOST")
      .Server()
      .With("rank", rank)
      .Message(Name(rank) +
               "'s connection has ended: its process is gone, or the network "
               "between." +
               kLost);
}

absl::Status RankBlamed(int rank, int reporter, const absl::Status& report) {
  const auto detail = GetErrorDetail(report);
  // Not the report's code: UNAVAILABLE would invite clients to try again.
  ErrorBuilder error(absl::StatusCode::kAborted, detail ? detail->reason : "");
  if (detail) {
    for (const auto& [key, value] : detail->metadata) error.With(key, value);
  }
  return error.Server()
      .With("rank", rank)
      .With("reported_by", reporter)
      .Message(Name(rank) + " failed its peers; rank " +
               std::to_string(reporter) +
               " says: " + std::string(report.message()) + kLost);
}

bool IsCollectiveFailure(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail && (detail->reason == "COLLECTIVE_TIMEOUT" ||
                    detail->reason == "COLLECTIVE_FAILED");
}

std::string RestartCause(const v1::OperationError& failure) {
  const std::string& reason = failure.reason();
  if (reason == "RANK_EXITED") {
    return failure.metadata().count("signal") != 0 ? "rank_signal"
                                                   : "rank_exit";
  }
  if (reason == "RANK_HUNG" || reason == "COLLECTIVE_TIMEOUT") return "hang";
  if (reason == "RANK_LOST" || reason == "COLLECTIVE_FAILED") return "node";
  if (reason == "OUT_OF_MEMORY" || reason == "MEMORY_PLAN_EXCEEDED") {
    return "oom";
  }
  if (absl::StartsWith(reason, "STORAGE_")) return "storage";
  return "operator";
}

}  // namespace gradwire
