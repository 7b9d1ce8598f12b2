// SPDX-License-Identifier: Apache-2.0
#include "sharding/local/local_collectives.h"

#include <gtest/gtest.h>

#include "sharding/conformance.h"

namespace gradwire {
namespace {

INSTANTIATE_TEST_SUITE_P(Local, CollectivesConformanceTest,
                         testing::ValuesIn(ForEveryWorld(NewLocalCollectives)),
                         BackendName);

}  // namespace
}  // namespace gradwire
