// SPDX-License-Identifier: Apache-2.0
// The fast CPU backend: oneDNN for matmuls, Highway for everything else.
#pragma once

#include <memory>

#include "kernels/kernels.h"

namespace gradwire {

// Ops run on the thread pool of their stream, which must be a CpuStream.
std::unique_ptr<Kernels> NewCpuKernels();

}  // namespace gradwire
