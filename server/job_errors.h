// SPDX-License-Identifier: Apache-2.0
// What clients are told of handles that are no longer good, and of a server
// that will not be for long.
#pragma once

#include "absl/status/status.h"

namespace gradwire {

// FAILED_PRECONDITION HANDLE_FENCED.
absl::Status Fenced();
// FAILED_PRECONDITION MODEL_UNLOADED.
absl::Status Unloaded();
// ABORTED SEQUENCE_GAP. `missing`: the number that never came; 0: not known any
// more.
absl::Status SequenceGap(int64_t seq, int64_t missing);
// UNAVAILABLE SERVER_STOPPED: what was accepted is in the log.
absl::Status ServerStopping();

}  // namespace gradwire
