// SPDX-License-Identifier: Apache-2.0
// What the ranks of a trainer have to agree on: sums of counters, and whether
// an operation has failed. A rank that went on alone would wait for the others
// in vain.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "device/device.h"
#include "sharding/collectives.h"

namespace gradwire {

// Without collectives it is one rank, and agrees with itself. Thread rule: one
// thread at a time.
class Agreement {
 public:
  // All must outlive it.
  static absl::StatusOr<std::unique_ptr<Agreement>> Create(
      Collectives* collectives, Device& device, Stream& stream);

  bool alone() const { return collectives_ == nullptr; }

  // values = their sums over ranks, in rank order. Errors: the collectives'.
  absl::Status Sum(std::vector<double>& values);
  // The error of the first rank that has one, on all of them; then `sums` stay
  // as they are. Otherwise they are summed.
  absl::Status Agree(const absl::Status& mine, std::vector<double>* sums);
  // values[n] = those of `rank`.
  absl::Status Broadcast(float* values, int64_t n, int rank);

 private:
  // Doubles that fit the exchange buffer, and bytes of an error that do.
  static constexpr int64_t kDoubles = 4096;

  Agreement(Collectives* collectives, Device& device, Stream& stream)
      : collectives_(collectives), device_(device), stream_(stream) {}
  absl::Status Share(int rank, absl::Status mine);

  Collectives* const collectives_;
  Device& device_;
  Stream& stream_;
  std::unique_ptr<DeviceBuffer> buffer_;
};

}  // namespace gradwire
