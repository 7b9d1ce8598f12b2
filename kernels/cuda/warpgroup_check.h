// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gradwire {

// How many results of each form of product are wrong, of 128 rows; all, if none
// was written.
struct WarpgroupCheck {
  // Terms along rows, or along columns; of 128 columns, or of 64.
  int by_rows = -1, by_rows_64 = -1, by_columns = -1, by_columns_64 = -1;

  bool Right() const {
    return by_rows == 0 && by_rows_64 == 0 && by_columns == 0 &&
           by_columns_64 == 0;
  }
};

// Floats that CheckWarpgroups needs.
inline constexpr int64_t kWarpgroupCheckFloats =
    128 * (128 + 64) * 2 + 128 * 128 / 2;

// Whether products of warpgroups (device/cuda/warpgroup.h) give what they must
// on the current device: no more than a look at a few small numbers, but one
// that sees operands taken in another order, or code that is not there. `room`
// is memory of the device that nobody uses. Returns when it is known.
cudaError_t CheckWarpgroups(float* room, WarpgroupCheck& check);

}  // namespace gradwire
