// SPDX-License-Identifier: Apache-2.0
// Change of element type, in vectors.
#pragma once

#include <cstdint>

#include "device/dtype.h"

namespace gradwire {

// n adjacent elements. Narrowing rounds to nearest, ties to even, subnormals
// included; a NaN stays one.
void Narrow(const float* from, int64_t n, BFloat16* to);
void Widen(const BFloat16* from, int64_t n, float* to);

}  // namespace gradwire
