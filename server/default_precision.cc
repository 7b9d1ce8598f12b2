// SPDX-License-Identifier: Apache-2.0
#include "server/default_precision.h"

namespace gradwire {

std::string InstructionSet(const std::string& device) {
  return device.substr(device.find(' ') + 1);
}

const char* PrecisionName(Precision precision) {
  return precision == Precision::kBF16 ? "bf16" : "f32";
}

PrecisionChoice ChoosePrecision(const std::string& asked,
                                const std::string& device) {
  const std::string isa = InstructionSet(device);
  // Every GPU that is supported has them.
  const bool native =
      isa.find("bf16") != std::string::npos || isa.rfind("sm_", 0) == 0;
  if (asked == "f32") return {Precision::kF32, "the job asks for f32"};
  if (asked == "bf16") {
    return {Precision::kBF16,
            native ? "the job asks for bf16"
                   : "the job asks for bf16; " + isa +
                         " has no bf16 products, so operands are widened and "
                         "multiplied in f32, which is slower than f32"};
  }
  if (native) {
    return {Precision::kBF16,
            isa + " multiplies bf16 faster than f32, with sums in f32"};
  }
  return {Precision::kF32,
          isa +
              " has no bf16 products, and widening operands to f32 would "
              "only add to the work"};
}

}  // namespace gradwire
