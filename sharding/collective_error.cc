// SPDX-License-Identifier: Apache-2.0
#include "sharding/collective_error.h"

#include <string>

#include "base/error.h"

namespace gradwire {

absl::Status CollectiveTimeout(int rank, absl::Duration timeout) {
  return ErrorBuilder(absl::StatusCode::kUnavailable, "COLLECTIVE_TIMEOUT")
      .Server()
      .With("rank", rank)
      .With("seconds", absl::ToDoubleSeconds(timeout))
      .Message("the ranks waited " + absl::FormatDuration(timeout) +
               " for rank " + std::to_string(rank) +
               "; see in its log what holds it up");
}

absl::Status CollectiveFailed(int rank, const std::string& cause) {
  return ErrorBuilder(absl::StatusCode::kUnavailable, "COLLECTIVE_FAILED")
      .Server()
      .With("rank", rank)
      .With("cause", cause)
      .Message("rank " + std::to_string(rank) + " is lost to the others: " +
               cause + "; see in its log how it ended");
}

absl::Status RankStopped(int rank) {
  return ErrorBuilder(absl::StatusCode::kCancelled, "RANK_STOPPED")
      .Server()
      .With("rank", rank)
      .Message("rank " + std::to_string(rank) +
               " has given up its part of the model; the job's error says what "
               "ended it");
}

}  // namespace gradwire
