// SPDX-License-Identifier: Apache-2.0
// What the ranks of a test's job compute with, and speak to each other through:
// the CPU, or emulated GPUs, whichever is linked.
#pragma once

#include <memory>
#include <vector>

#include "device/device.h"
#include "kernels/kernels.h"
#include "sharding/collectives.h"

namespace gradwire {

// Of one rank.
std::unique_ptr<Device> NewJobDevice();
std::unique_ptr<Kernels> NewJobKernels(Device& device);
// Of one group, whose ranks are threads: of each a device of NewJobDevice.
std::vector<std::unique_ptr<Collectives>> NewJobCollectives(
    const std::vector<Device*>& devices);
// Of one rank: sharding/replicated_collectives.h.
std::unique_ptr<Collectives> NewJobReplicated(
    Device& device, std::unique_ptr<Collectives> shards,
    std::unique_ptr<Collectives> replicas);

}  // namespace gradwire
