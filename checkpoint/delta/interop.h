// SPDX-License-Identifier: Apache-2.0
// The change between two sets of weights for receivers that do not read
// gradwire's deltas. Both are larger, and neither has checksums.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "checkpoint/delta/encode.h"

namespace gradwire {

// A safetensors file with a U8 entry for each tensor that changed: the XOR of
// its old and new bytes, as one zstd frame. Fresh tensors are XORed with zeros.
// Errors: INVALID_ARGUMENT DELTA_INVALID (dtype).
absl::StatusOr<std::string> EncodeXorDelta(absl::Span<const TensorView> before,
                                           absl::Span<const TensorView> after);

// A safetensors file with two entries for each tensor that changed:
// "<name>.indices" (I32, flat positions, ascending) and "<name>.values" (of the
// tensor's dtype). Errors: INVALID_ARGUMENT DELTA_INVALID: a dtype that is
// unknown, a tensor of more than 2^31 elements, or one that is fresh.
absl::StatusOr<std::string> EncodeSparseDelta(
    absl::Span<const TensorView> before, absl::Span<const TensorView> after);

}  // namespace gradwire
