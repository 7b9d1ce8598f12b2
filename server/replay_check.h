// SPDX-License-Identifier: Apache-2.0
// Whether an operation that was run again, by other kernels than the first
// time, came to what it had come to but for rounding. docs/recovery.md.
#pragma once

#include <cstdint>

#include "gradwire/v1/operations.pb.h"
#include "gradwire/v1/rank.pb.h"

namespace gradwire {

// Of the larger of two losses or norms.
inline constexpr double kReplayTolerance = 0.02;
inline constexpr double kReplayNormTolerance = 0.1;

// True if `has`, which must have succeeded, counts as much as `had` (datums,
// tokens, sequences, steps, versions, skipped or not), if losses differ by at
// most 2 % or 0.02 a token, and norms of gradients by at most 10 %.
// `weight_version` and `optimizer_step` are those after the first time.
bool IsWithinTolerance(const v1::Operation& had, int64_t weight_version,
                       int64_t optimizer_step, const v1::RankDone& has);

}  // namespace gradwire
