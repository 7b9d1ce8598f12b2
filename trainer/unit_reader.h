// SPDX-License-Identifier: Apache-2.0
// What a save's thread reads of a training that goes on: unit by unit, in the
// order in which an optimizer step changes them, so that a step which waits for
// each unit before it changes it waits for no more than that.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "device/device.h"
#include "device/stream.h"
#include "device/tensor.h"

namespace gradwire {

class UnitReader {
 public:
  // `device` outlives this.
  explicit UnitReader(Device& device)
      : device_(device), stream_(device.NewStream()) {}

  // For the thread that reads.

  // Elements [begin, begin + n) where the host can read them, until the next
  // call with the same `copy`; from a GPU they come by a stream of their own.
  absl::StatusOr<const void*> InHostMemory(const Tensor& values, int64_t begin,
                                           int64_t n, std::vector<char>& copy);
  // Those before `units` may change.
  void SetRead(int units);
  // CANCELLED once somebody has given it up.
  absl::Status CheckGoesOn() const;

  // For all others.

  // Waits until the elements of this unit, and of those before it, may change.
  void AwaitRead(int unit) const;
  void GiveUp();

 private:
  Device& device_;
  const std::unique_ptr<Stream> stream_;
  mutable std::mutex mutex_;
  mutable std::condition_variable read_;
  int units_read_ = 0;     // guarded by mutex_
  bool given_up_ = false;  // guarded by mutex_
};

}  // namespace gradwire
