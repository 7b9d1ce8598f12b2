// SPDX-License-Identifier: Apache-2.0
// What tests can ask of the emulator's cuBLASLt, and do to it.
#pragma once

#include <cublasLt.h>

#include <cstdint>

namespace gradwire::cuda_emulator {

// How often an algorithm has been asked for in this process.
int64_t NumHeuristics();

// The next product is refused with `status`.
void FailNextMatmul(cublasStatus_t status);

// From here on algorithms are for no other size than that which they were
// chosen for; those of before, too. As it is before the first call: for all
// that the lengths of their rows allow.
void BindToSizes(bool bind);

// From here on the choice is an algorithm that sums so many parts of the terms
// apart: 1, as it is before the first call unless the environment says another
// in GRADWIRE_EMULATED_GEMM_PARTS, or 2.
void ChooseParts(int parts);

}  // namespace gradwire::cuda_emulator
