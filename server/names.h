// SPDX-License-Identifier: Apache-2.0
// Names that clients choose and that become parts of paths.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace gradwire {

// One path segment: 1-128 of [A-Za-z0-9._-], not starting with a dot.
// Errors: INVALID_ARGUMENT INVALID_NAME.
absl::Status CheckName(const std::string& name, const std::string& field);
// 1-63 of [a-z0-9-], starting with a letter or digit.
absl::Status CheckJobId(const std::string& job_id);

}  // namespace gradwire
