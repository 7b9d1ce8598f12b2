// SPDX-License-Identifier: Apache-2.0
// Collectives of GPU ranks through NCCL.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "device/cuda/cuda_device.h"
#include "sharding/collectives.h"
#include "sharding/gloo/gloo_options.h"

namespace gradwire {

struct NcclOptions {
  // The ranks' connections over TCP, and the timeout.
  GlooOptions control;
  // Of the device's memory, for addends that have arrived.
  int64_t staging_bytes = int64_t{64} << 20;
};

// What work on the device that stands between two groups needs of them.
class NcclGroup : public Collectives {
 public:
  // What errors call this rank (GlooOptions).
  virtual int name() const = 0;
  // As Wait, of a stream that has nothing else to do: statistics() do not count
  // that it waits.
  virtual absl::Status Follow(Stream& stream, Ticket ticket) = 0;
  // `told` is called once, by a thread that holds no lock, when the group has
  // failed and before its memory is free; now, if it has. Of several the last.
  virtual void WhenFailed(std::function<void(const absl::Status&)> told) = 0;
};

// One rank of a group, whose streams are those of `device`, which must outlive
// it. Data go through NCCL, on a stream of their own. Besides, ranks are
// connected over TCP: there they agree on NCCL's group, tell each other why
// they end it, and find out who is late; a collective that takes longer than
// control.timeout from the moment at which this rank's part of it could begin
// ends the group, and with it NCCL's communicator.
//
// NCCL adds in an order of its own choice. So sums are exchanged as they are
// and added here, in rank order: docs/sharding.md tells what that costs.
//
// Returns when the ranks are connected; one rank alone exchanges nothing.
// REQUIRES: 0 <= control.rank < control.world; control.timeout > 0;
// staging_bytes >= 0.
// Errors: those of NewGlooCollectives; RESOURCE_EXHAUSTED OUT_OF_MEMORY;
// INTERNAL DEVICE_FAILED.
absl::StatusOr<std::unique_ptr<NcclGroup>> NewNcclCollectives(
    CudaDevice& device, const NcclOptions& options,
    const ExchangeAddresses& exchange);

}  // namespace gradwire
