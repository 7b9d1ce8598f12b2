// SPDX-License-Identifier: Apache-2.0
// Ranks on GPUs: the kernels of kernels/cuda, NCCL between them.
#include "server/cuda_backend.h"

#include <utility>

#include "base/status.h"
#include "device/cuda/cuda_device.h"
#include "kernels/cuda/cuda_kernels.h"
#include "sharding/nccl/nccl_collectives.h"
#include "sharding/nccl/replicated_nccl.h"

namespace gradwire {

absl::StatusOr<RankBackend> MakeCudaBackend(int index) {
  GW_ASSIGN_OR_RETURN(std::unique_ptr<CudaDevice> device,
                      CudaDevice::Create(index));
  RankBackend backend;
  GW_ASSIGN_OR_RETURN(backend.kernels, NewCudaKernels(*device));
  backend.connect = [device = device.get()](const GlooOptions& options,
                                            const ExchangeAddresses& exchange) {
    NcclOptions nccl;
    nccl.control = options;
    return NewNcclCollectives(*device, nccl, exchange);
  };
  backend.replicate = [device = device.get()](
                          std::unique_ptr<Collectives> shards,
                          std::unique_ptr<Collectives> replicas) {
    // As `connect` has made them.
    const auto nccl = [](std::unique_ptr<Collectives> group) {
      return std::unique_ptr<NcclGroup>(
          static_cast<NcclGroup*>(group.release()));
    };
    return NewReplicatedNcclCollectives(*device, nccl(std::move(shards)),
                                        nccl(std::move(replicas)));
  };
  backend.device = std::move(device);
  return backend;
}

}  // namespace gradwire
