// SPDX-License-Identifier: Apache-2.0
// What kind of GPU the emulator is.
#pragma once

namespace gradwire::cuda_emulator {

// 10 times the major number and the minor one: 90 until a test sets another.
int ComputeCapability();
void SetComputeCapability(int capability);

}  // namespace gradwire::cuda_emulator
