// SPDX-License-Identifier: Apache-2.0
// The JSON lines that benchmarks print, all with the same fields.
#pragma once

#include <cstdint>
#include <string>

#include "benchmarks/kernels/ceilings.h"
#include "device/dtype.h"
#include "nlohmann/json.hpp"

namespace gradwire {

// What the lines of a run have in common.
struct RunInfo {
  std::string bench;
  std::string commit;  // empty: not known
  std::string device;  // Kernels::description()
  int threads = 0;
  std::string model;
  DType act = DType::kF32;
  int64_t length = 0;  // tokens of a sequence
  int64_t tokens = 0;  // of the batch
  int rounds = 0;
  Ceilings ceilings;
};

// A line for an op, or for what stands in its place; fields that do not apply
// are null.
nlohmann::ordered_json NewLine(const RunInfo& run, const std::string& op);

// On stdout.
void PrintLine(const nlohmann::ordered_json& line);

}  // namespace gradwire
