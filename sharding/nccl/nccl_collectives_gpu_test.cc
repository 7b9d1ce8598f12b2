// SPDX-License-Identifier: Apache-2.0
// The conformance suite with one rank, on the GPU of this machine.
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "device/cuda/test_device.h"
#include "sharding/conformance.h"
#include "sharding/nccl/nccl_collectives.h"

namespace gradwire {
namespace {

// Null on a machine without a GPU.
const std::shared_ptr<CudaDevice>& TheDevice() {
  static const auto* const device =
      new std::shared_ptr<CudaDevice>(MakeTestDevice());
  return *device;
}

std::vector<std::unique_ptr<Collectives>> NewGroup(int world,
                                                   absl::Duration timeout) {
  GW_CHECK(world == 1);
  auto made = NewNcclCollectives(*TheDevice(),
                                 {.control = {.timeout = timeout}}, nullptr);
  GW_CHECK(made.ok());
  std::vector<std::unique_ptr<Collectives>> group;
  group.push_back(*std::move(made));
  return group;
}

std::vector<CollectivesBackend> OneRank() {
  if (!TheDevice()) return {};
  return {{1, NewGroup, TheDevice()}};
}

INSTANTIATE_TEST_SUITE_P(Nccl, CollectivesConformanceTest,
                         testing::ValuesIn(OneRank()), BackendName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(CollectivesConformanceTest);

}  // namespace
}  // namespace gradwire
