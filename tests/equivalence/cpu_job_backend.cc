// SPDX-License-Identifier: Apache-2.0
#include <utility>

#include "absl/time/time.h"
#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "sharding/local/local_collectives.h"
#include "sharding/replicated_collectives.h"
#include "tests/equivalence/job_backend.h"

namespace gradwire {

std::unique_ptr<Device> NewJobDevice() {
  return std::make_unique<CpuDevice>(1);
}

std::unique_ptr<Kernels> NewJobKernels(Device&) { return NewCpuKernels(); }

std::vector<std::unique_ptr<Collectives>> NewJobCollectives(
    const std::vector<Device*>& devices) {
  return NewLocalCollectives(static_cast<int>(devices.size()),
                             absl::Seconds(60));
}

std::unique_ptr<Collectives> NewJobReplicated(
    Device&, std::unique_ptr<Collectives> shards,
    std::unique_ptr<Collectives> replicas) {
  return NewReplicatedCollectives(std::move(shards), std::move(replicas));
}

}  // namespace gradwire
