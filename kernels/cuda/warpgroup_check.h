// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gradwire {

// Floats that CheckWarpgroups needs.
inline constexpr int64_t kWarpgroupCheckFloats = 2 * 64 * 128;

// Whether products of warpgroups (device/cuda/warpgroup.h) give what they must
// on the current device, one of sm_90: no more than a look at a few small
// numbers, but one that sees operands taken in another order, or code that is
// not there. `room` is memory of the device. Returns when it is known.
cudaError_t CheckWarpgroups(float* room, bool& right);

}  // namespace gradwire
