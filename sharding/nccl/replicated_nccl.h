// SPDX-License-Identifier: Apache-2.0
// sharding/replicated_collectives.h for GPUs: sums over groups stay on the
// device.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "device/cuda/cuda_device.h"
#include "sharding/collectives.h"
#include "sharding/nccl/nccl_collectives.h"

namespace gradwire {

// As NewReplicatedCollectives. Both are NewNcclCollectives' of `device`, which
// must outlive this. A sum is made in pieces of `sum_bytes`, twice which is
// taken of the device's memory. When one of the groups fails, so does the
// other. REQUIRES: sum_bytes is a positive multiple of 4. Errors:
// RESOURCE_EXHAUSTED OUT_OF_MEMORY; INTERNAL DEVICE_FAILED.
absl::StatusOr<std::unique_ptr<Collectives>> NewReplicatedNcclCollectives(
    CudaDevice& device, std::unique_ptr<NcclGroup> shards,
    std::unique_ptr<NcclGroup> replicas, int64_t sum_bytes = int64_t{16} << 20);

}  // namespace gradwire
