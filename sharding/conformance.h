// SPDX-License-Identifier: Apache-2.0
// One suite for every backend of Collectives: exact values, queueing, and what
// is promised when a rank does not come, aborts or leaves.
//
// A backend's test instantiates it:
//   INSTANTIATE_TEST_SUITE_P(Local, CollectivesConformanceTest,
//   testing::ValuesIn(ForEveryWorld(NewLocalCollectives)), TestName);
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "device/cpu_device.h"
#include "sharding/collectives.h"

namespace gradwire {

struct CollectivesBackend {
  int world = 1;
  // All ranks of a new group, in rank order.
  std::function<std::vector<std::unique_ptr<Collectives>>(
      int world, absl::Duration timeout)>
      make;
};

// The backend with 1, 2, 3, 4 and 7 ranks.
std::vector<CollectivesBackend> ForEveryWorld(
    decltype(CollectivesBackend::make) make);
std::string BackendName(const testing::TestParamInfo<CollectivesBackend>& info);
inline void PrintTo(const CollectivesBackend& backend, std::ostream* out) {
  *out << backend.world << " ranks";
}

// What a rank's thread works with.
struct RankThread {
  Collectives& group;
  Stream& stream;

  int rank() const { return group.rank(); }
  int world() const { return group.world(); }
  absl::Status Wait(Collectives::Ticket ticket) {
    return group.Wait(stream, ticket);
  }
};

class CollectivesConformanceTest
    : public testing::TestWithParam<CollectivesBackend> {
 protected:
  // Long enough for a machine under a sanitizer, short enough to see a hang.
  static constexpr absl::Duration kLong = absl::Seconds(100);

  using Group = std::vector<std::unique_ptr<Collectives>>;

  int world() const { return GetParam().world; }
  Group NewGroup(absl::Duration timeout = kLong) {
    return GetParam().make(world(), timeout);
  }

  // Runs `body` for each rank in [0, end) on a thread of its own.
  void Run(const Group& group, int end,
           const std::function<void(RankThread)>& body);
  void RunAll(const std::function<void(RankThread)>& body) {
    Run(NewGroup(), world(), body);
  }

  CpuDevice device_{1};
};

}  // namespace gradwire
