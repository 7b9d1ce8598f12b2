// SPDX-License-Identifier: Apache-2.0
#include <thread>
#include <utility>

#include "absl/time/time.h"
#include "base/check.h"
#include "device/cuda/cuda_device.h"
#include "kernels/cuda/cuda_kernels.h"
#include "sharding/gloo/address_board.h"
#include "sharding/nccl/nccl_collectives.h"
#include "sharding/nccl/replicated_nccl.h"
#include "tests/equivalence/job_backend.h"

namespace gradwire {

std::unique_ptr<Device> NewJobDevice() {
  auto device = CudaDevice::Create(0);
  GW_CHECK(device.ok());
  return *std::move(device);
}

std::unique_ptr<Kernels> NewJobKernels(Device& device) {
  auto kernels = NewCudaKernels(static_cast<CudaDevice&>(device));
  GW_CHECK(kernels.ok());
  return *std::move(kernels);
}

std::vector<std::unique_ptr<Collectives>> NewJobCollectives(
    const std::vector<Device*>& devices) {
  const int world = static_cast<int>(devices.size());
  AddressBoard board(world);
  std::vector<std::unique_ptr<Collectives>> ranks(devices.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      const auto at = static_cast<size_t>(rank);
      auto made =
          NewNcclCollectives(static_cast<CudaDevice&>(*devices[at]),
                             {.control = {.rank = rank,
                                          .world = world,
                                          .timeout = absl::Seconds(300)},
                              // Several turns for the larger sums.
                              .staging_bytes = 1 << 14},
                             board.ForRank(rank));
      GW_CHECK(made.ok());
      ranks[at] = *std::move(made);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return ranks;
}

std::unique_ptr<Collectives> NewJobReplicated(
    Device& device, std::unique_ptr<Collectives> shards,
    std::unique_ptr<Collectives> replicas) {
  const auto nccl = [](std::unique_ptr<Collectives> group) {
    return std::unique_ptr<NcclGroup>(static_cast<NcclGroup*>(group.release()));
  };
  // Several pieces of the larger sums.
  auto made = NewReplicatedNcclCollectives(static_cast<CudaDevice&>(device),
                                           nccl(std::move(shards)),
                                           nccl(std::move(replicas)), 1 << 12);
  GW_CHECK(made.ok());
  return *std::move(made);
}

}  // namespace gradwire
