// SPDX-License-Identifier: Apache-2.0
// What the ranks that are started here compute with.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace gradwire {

// What Kernels::description() says there. Of a GPU a rank's program is asked,
// since this process touches none; one that has not answered after `timeout` is
// killed (a driver that is not kept loaded takes some seconds for each GPU).
// `device`: "cpu" or "cuda".
// Errors: INVALID_ARGUMENT DEVICE_UNKNOWN; FAILED_PRECONDITION
// DEVICE_NOT_FOUND, with what the program said.
absl::StatusOr<std::string> DescribeDevice(
    const std::string& rank_binary, const std::string& device,
    absl::Duration timeout = absl::Minutes(2));

}  // namespace gradwire
