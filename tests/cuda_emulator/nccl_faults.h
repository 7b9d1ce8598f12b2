// SPDX-License-Identifier: Apache-2.0
// What a network does to NCCL.
#pragma once

namespace gradwire::cuda_emulator {

// From now on every communicator of this rank says that its network failed, and
// its collectives hang, until the next communicator is made.
void BreakNccl(int rank);

// Whether a communicator of this rank was aborted since the last one was made.
bool WasAborted(int rank);

}  // namespace gradwire::cuda_emulator
