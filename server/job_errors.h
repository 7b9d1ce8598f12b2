// SPDX-License-Identifier: Apache-2.0
// What a handle that is no longer good is told.
#pragma once

#include "absl/status/status.h"

namespace gradwire {

// FAILED_PRECONDITION HANDLE_FENCED.
absl::Status Fenced();
// FAILED_PRECONDITION MODEL_UNLOADED.
absl::Status Unloaded();

}  // namespace gradwire
