// SPDX-License-Identifier: Apache-2.0
// A model that is sharded within groups of ranks and the same in each of them
// (HSDP): gathers stay within a group, gradients are summed over all.
// docs/sharding.md.
#pragma once

#include <memory>

#include "sharding/collectives.h"

namespace gradwire {

// The collectives of a shard group whose rank r has, in `replicas`, the rank r
// of every group. All are the shard group's, but that ReduceScatter, of
// whatever parts, sums over the groups as well: within each group in rank
// order, then those sums in the groups' order.
std::unique_ptr<Collectives> NewReplicatedCollectives(
    std::unique_ptr<Collectives> shards, std::unique_ptr<Collectives> replicas);

}  // namespace gradwire
