// SPDX-License-Identifier: Apache-2.0
// Collectives of CPU ranks over TCP, through gloo's transport.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "sharding/collectives.h"

namespace gradwire {

struct GlooOptions {
  int rank = 0;
  int world = 1;
  // An IPv4 or IPv6 address of this machine at which the others reach it.
  std::string bind_address = "127.0.0.1";
  // A rank that waits longer than this for one message of another, or for its
  // connection, ends the group.
  absl::Duration timeout = absl::Minutes(5);
};

// Makes this rank's address known (bytes that mean nothing to others, about 136
// for each rank) and returns those of all ranks, in rank order.
using ExchangeAddresses =
    std::function<absl::StatusOr<std::vector<std::string>>(
        const std::string& mine)>;

// One rank of a group. Returns when it is connected to all others; one rank
// alone needs no network, and exchanges nothing. Signals SIGPIPE are ignored
// from then on, unless the process handles them.
// REQUIRES: 0 <= rank < world; timeout > 0.
// Errors: INVALID_ARGUMENT ADDRESS_INVALID; those of `exchange` and of
// Collectives.
absl::StatusOr<std::unique_ptr<Collectives>> NewGlooCollectives(
    const GlooOptions& options, const ExchangeAddresses& exchange);

}  // namespace gradwire
