// SPDX-License-Identifier: Apache-2.0
// Ranks that are threads of one process and read each other's memory. For
// tests.
#pragma once

#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "sharding/collectives.h"

namespace gradwire {

// A group of `world` ranks, in rank order, each for one thread. A rank that
// waits longer than `timeout` for another ends the group.
std::vector<std::unique_ptr<Collectives>> NewLocalCollectives(
    int world, absl::Duration timeout);

}  // namespace gradwire
