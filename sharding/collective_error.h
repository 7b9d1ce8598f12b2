// SPDX-License-Identifier: Apache-2.0
// How a group of ranks can fail, in the words of docs/errors.md.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace gradwire {

// UNAVAILABLE COLLECTIVE_TIMEOUT: nothing came from `rank` for `timeout`.
absl::Status CollectiveTimeout(int rank, absl::Duration timeout);

// UNAVAILABLE COLLECTIVE_FAILED: `rank` can no longer be reached. `cause` is a
// few words without addresses.
absl::Status CollectiveFailed(int rank, const std::string& cause);

// CANCELLED RANK_STOPPED: `rank` gives up its part while others may wait for
// it.
absl::Status RankStopped(int rank);

}  // namespace gradwire
