// SPDX-License-Identifier: Apache-2.0
// What a rank computes with, and what it speaks to its peers through.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "device/device.h"
#include "kernels/kernels.h"
#include "sharding/collectives.h"
#include "sharding/gloo/gloo_options.h"

namespace gradwire {

struct RankBackend {
  std::unique_ptr<Device> device;
  std::unique_ptr<Kernels> kernels;
  // The ranks of one group, whose tensors are the device's.
  std::function<absl::StatusOr<std::unique_ptr<Collectives>>(
      const GlooOptions& options, const ExchangeAddresses& exchange)>
      connect;
  // Of a job that holds its model several times, a rank's collectives within
  // its group and with the same rank of the others made one
  // (sharding/replicated_collectives.h).
  std::function<absl::StatusOr<std::unique_ptr<Collectives>>(
      std::unique_ptr<Collectives> shards,
      std::unique_ptr<Collectives> replicas)>
      replicate;

  // "cpu avx512_bf16, 8 threads", "cuda sm_90, 132
  // multiprocessors": for profiles and fingerprints.
  std::string description() const;
};

// `device`: "cpu"; "cuda:N", the Nth GPU that the process sees; "cuda", the
// first one. `threads`: of the CPU, 0 for one for each core.
// Errors: INVALID_ARGUMENT DEVICE_UNKNOWN; FAILED_PRECONDITION
// DEVICE_NOT_SUPPORTED, of a program that was built without CUDA, and
// DEVICE_NOT_FOUND; RESOURCE_EXHAUSTED OUT_OF_MEMORY; INTERNAL DEVICE_FAILED.
absl::StatusOr<RankBackend> MakeRankBackend(const std::string& device,
                                            int threads);

}  // namespace gradwire
