// SPDX-License-Identifier: Apache-2.0
// How the ranks of a job come to speak to each other.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/rank_backend.h"
#include "sharding/collectives.h"

namespace gradwire {

struct RankGroupJoin {
  int rank = 0;
  int world = 1;
  // Groups of ranks that each hold all of the model: neighbours are of one. 1:
  // all ranks hold it together. Divides `world`.
  int replicas = 1;
  const RankBackend* backend = nullptr;
  // How long a rank waits for its peers.
  absl::Duration timeout;
  // An address of this machine at which the others reach it.
  std::string address;
  // Publishes this rank's address in one of several meshes, and returns those
  // of all ranks in rank order.
  std::function<absl::StatusOr<std::vector<std::string>>(
      int mesh, const std::string& mine)>
      exchange;
};

struct RankGroupMember {
  // Of all ranks; null if there is one.
  std::unique_ptr<Collectives> world;
  // Of those that hold the model together, if there are several such groups.
  std::unique_ptr<Collectives> shards;
  // Ranks on this machine, this one included.
  int ranks_on_host = 1;
};

// Errors: those of the exchange, and of the backend's `connect` and
// `replicate`.
absl::StatusOr<RankGroupMember> JoinRankGroup(const RankGroupJoin& join);

// The address from which this machine reaches a supervisor ("unix:..." or
// HOST:PORT): loopback, unless that is elsewhere.
// Errors: UNAVAILABLE ADDRESS_UNKNOWN.
absl::StatusOr<std::string> AddressTowards(const std::string& supervisor);

}  // namespace gradwire
