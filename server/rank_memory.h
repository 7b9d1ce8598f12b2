// SPDX-License-Identifier: Apache-2.0
// What a rank says of its memory: the plan, and what it has used of it.
#pragma once

#include <cstdint>
#include <string>

#include "gradwire/v1/jobs.pb.h"
#include "trainer/trainer.h"

namespace gradwire {

v1::MemoryPlan ToProto(const MemoryPlan& plan);

// `other`: bytes outside of the plan.
v1::MemoryUse ToProto(const MemoryUse& use, int64_t other);

// A line of /proc/self/status, in bytes; 0 if there is none.
int64_t ProcessBytes(const std::string& key);

}  // namespace gradwire
