// SPDX-License-Identifier: Apache-2.0
// Makes Collectives out of plain blocking ones: a thread that runs them in
// order, the first failure that sticks, statistics. For backends on the CPU,
// where work in a stream is done when a collective is called.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "device/tensor.h"
#include "sharding/collectives.h"

namespace gradwire {

// One rank's end of a group. Collectives are as in Collectives, and done when
// they return; the arguments are checked. An error means that the rank is out
// of the group, and that the memory is no longer touched.
// Thread rule: one thread at a time, Interrupt and bytes_sent from any.
class BlockingCollectives {
 public:
  // Whoever still counts on this rank is told that it left.
  virtual ~BlockingCollectives() = default;

  virtual int rank() const = 0;
  virtual int world() const = 0;

  virtual absl::Status AllGather(const Tensor& shard, const Tensor& full) = 0;
  virtual absl::Status ReduceScatterParts(const Tensor& full, int64_t stride,
                                          const Tensor& shard,
                                          bool accumulate) = 0;
  virtual absl::Status AllReduce(const Tensor& values) = 0;
  virtual absl::Status Broadcast(const Tensor& values, int root) = 0;

  // The collective that runs, if any, and all later ones fail soon. Returns at
  // once.
  virtual void Interrupt() = 0;
  // Called once, after a failure or an interruption: tells the peers.
  virtual void End() = 0;

  virtual int64_t bytes_sent() const = 0;
};

std::unique_ptr<Collectives> NewQueuedCollectives(
    std::unique_ptr<BlockingCollectives> backend);

}  // namespace gradwire
