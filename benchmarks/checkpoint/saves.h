// SPDX-License-Identifier: Apache-2.0
// What a checkpoint and a snapshot cost the training: steps without a save, one
// that the training stands still for, and steps beside one. The stall is what
// the training waits for: the beginning and the publishing, and how much longer
// an optimizer step takes than without. The rest of the difference is what
// writing takes of cores and memory.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "benchmarks/step/local_step.h"

namespace gradwire {

// A table and a JSON line for each kind of save, on stdout. Flags: --directory,
// --rounds, --commit. `device` is the kernels' description; threads: of the
// host that compute, 0 on a GPU.
absl::Status RunSaves(LocalStep& step, const std::string& device, int threads);

// Of a program: parses its flags and tells its failure.
int RunProgram(int argc, char** argv, absl::Status (*program)());

}  // namespace gradwire
