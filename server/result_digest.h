// SPDX-License-Identifier: Apache-2.0
// A digest over what a command has computed, the same whenever the same command
// runs on the same state again.
#pragma once

#include <string>
#include <vector>

#include "gradwire/v1/data.pb.h"
#include "gradwire/v1/rank.pb.h"

namespace gradwire {

// XXH3-128, 16 bytes, over the result and the datums' logprobs, which are in
// the order of the datums. It leaves out who asked and when, and what a
// repetition may do in another way: what was used, kept or made again.
// Pure: no threads.
std::string ResultDigest(const v1::RankDone& done,
                         const std::vector<v1::LogprobItem>& logprobs);

}  // namespace gradwire
