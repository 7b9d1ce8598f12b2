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
#include "sharding/conformance_values.h"

namespace gradwire {

struct CollectivesBackend {
  int world = 1;
  // All ranks of a new group, in rank order.
  std::function<std::vector<std::unique_ptr<Collectives>>(
      int world, absl::Duration timeout)>
      make;
  // Whose memory and streams they work with; shared by the ranks.
  std::shared_ptr<Device> device;
};

// The backend with 1, 2, 3, 4 and 7 ranks.
std::vector<CollectivesBackend> ForEveryWorld(
    decltype(CollectivesBackend::make) make,
    std::shared_ptr<Device> device = std::make_shared<CpuDevice>(1));
std::string BackendName(const testing::TestParamInfo<CollectivesBackend>& info);
inline void PrintTo(const CollectivesBackend& backend, std::ostream* out) {
  *out << backend.world << " ranks";
}

// A rank's end of a group, and a stream of its own.
struct RankThread {
  RankThread(Collectives& group, Device& device)
      : group(group),
        device(device),
        own_stream(device.NewStream()),
        stream(*own_stream) {}

  int rank() const { return group.rank(); }
  int world() const { return group.world(); }

  // Memory of the device with these values.
  template <typename T>
  OnDevice<T> Put(const std::vector<T>& values) {
    return OnDevice<T>(device, stream, values);
  }
  // Returns when the collective is done, whether or not the group's Wait does.
  absl::Status Wait(Collectives::Ticket ticket) {
    const absl::Status status = group.Wait(stream, ticket);
    const absl::Status finished = stream.Finish();
    return status.ok() ? finished : status;
  }

  Collectives& group;
  Device& device;
  const std::unique_ptr<Stream> own_stream;
  Stream& stream;
};

class CollectivesConformanceTest
    : public testing::TestWithParam<CollectivesBackend> {
 protected:
  // Long enough for a machine under a sanitizer, short enough to see a hang.
  static constexpr absl::Duration kLong = absl::Seconds(100);

  using Group = std::vector<std::unique_ptr<Collectives>>;

  int world() const { return GetParam().world; }
  Device& device() const { return *GetParam().device; }
  Group NewGroup(absl::Duration timeout = kLong) {
    return GetParam().make(world(), timeout);
  }

  // Runs `body` for each rank in [0, end) on a thread of its own.
  void Run(const Group& group, int end,
           const std::function<void(RankThread&)>& body);
  void RunAll(const std::function<void(RankThread&)>& body) {
    Run(NewGroup(), world(), body);
  }
};

}  // namespace gradwire
