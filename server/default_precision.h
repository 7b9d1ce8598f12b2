// SPDX-License-Identifier: Apache-2.0
// What a job computes in, and why.
#pragma once

#include <string>

#include "trainer/trainer.h"

namespace gradwire {

struct PrecisionChoice {
  Precision precision = Precision::kF32;
  std::string reason;  // a sentence for people
};

// `asked`: "f32", "bf16", or empty for the device's default. `device`: what
// Kernels::description() says, whose second word is the instruction set of the
// products.
PrecisionChoice ChoosePrecision(const std::string& asked,
                                const std::string& device);

// "avx512_bf16" of "cpu avx512_bf16".
std::string InstructionSet(const std::string& device);

const char* PrecisionName(Precision precision);

}  // namespace gradwire
