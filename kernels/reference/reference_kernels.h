// SPDX-License-Identifier: Apache-2.0
// The definition of every op as a backend: plain loops in float64 over tensors
// in host memory, results rounded once. For tests; as slow as it looks.
#pragma once

#include <memory>

#include "kernels/kernels.h"

namespace gradwire {

std::unique_ptr<Kernels> NewReferenceKernels();

}  // namespace gradwire
