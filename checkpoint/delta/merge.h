// SPDX-License-Identifier: Apache-2.0
// Several deltas made one, without any weights: differences add up.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "checkpoint/delta/delta_file.h"

namespace gradwire {

// The delta from the parent of the first to the result of the last; each must
// be the parent of the next. Its model, step and base are the last one's, its
// chain as long as the first one's. What a chunk's checksum is, the last delta
// that has the tensor says.
// Errors: FAILED_PRECONDITION DELTA_PARENT_MISMATCH (expected, have);
// INVALID_ARGUMENT DELTA_INVALID; FAILED_PRECONDITION DELTA_SHARDS_DIFFER: the
// groups of a tensor are cut at different places.
absl::StatusOr<std::string> MergeDeltas(
    absl::Span<const DeltaFile* const> deltas);

}  // namespace gradwire
