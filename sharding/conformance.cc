// SPDX-License-Identifier: Apache-2.0
#include "sharding/conformance.h"

#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace gradwire {

std::vector<CollectivesBackend> ForEveryWorld(
    decltype(CollectivesBackend::make) make, std::shared_ptr<Device> device) {
  std::vector<CollectivesBackend> backends;
  for (const int world : {1, 2, 3, 4, 7}) {
    backends.push_back({world, make, device});
  }
  return backends;
}

std::string BackendName(
    const testing::TestParamInfo<CollectivesBackend>& info) {
  return std::to_string(info.param.world);
}

void CollectivesConformanceTest::Run(
    const Group& group, int end, const std::function<void(RankThread&)>& body) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < end; ++rank) {
    threads.emplace_back([&, rank] {
      RankThread thread(*group[static_cast<size_t>(rank)], device());
      body(thread);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace gradwire
