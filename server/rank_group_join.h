// SPDX-License-Identifier: Apache-2.0
// How the ranks of a job come to speak to each other.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "sharding/collectives.h"

namespace gradwire {

struct RankGroupJoin {
  int rank = 0;
  int world = 1;
  // How long a rank waits for its peers.
  absl::Duration timeout;
  // Publishes this rank's address, and returns those of all in rank order.
  std::function<absl::StatusOr<std::vector<std::string>>(
      const std::string& mine)>
      exchange;
};

// The collectives of all ranks of the job; null if there is one.
// Errors: those of the exchange; UNIMPLEMENTED COLLECTIVES_UNAVAILABLE.
absl::StatusOr<std::unique_ptr<Collectives>> JoinRankGroup(
    const RankGroupJoin& join);

}  // namespace gradwire
