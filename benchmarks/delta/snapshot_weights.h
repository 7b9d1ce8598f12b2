// SPDX-License-Identifier: Apache-2.0
// The weights of two snapshots of one job.
#pragma once

#include <string>

#include "benchmarks/delta/training_step.h"

namespace gradwire {

// The bf16 tensors of two files model.safetensors, in the order in which they
// lie there. Ends the program with a word if a file cannot be read or the two
// have other tensors.
TrainedWeights ReadSnapshots(const std::string& before,
                             const std::string& after);

}  // namespace gradwire
