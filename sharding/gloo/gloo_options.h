// SPDX-License-Identifier: Apache-2.0
// How a rank finds the others.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace gradwire {

struct GlooOptions {
  int rank = 0;
  int world = 1;
  // What errors call the ranks, where they are some of a larger world; empty:
  // as here.
  std::vector<int> names = {};
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

}  // namespace gradwire
