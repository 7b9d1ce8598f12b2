// SPDX-License-Identifier: Apache-2.0
// The JSON of a delta file, and the names of its streams.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "checkpoint/delta/delta_file.h"

namespace gradwire {

// Of the safetensors entries of a tensor.
std::string TableEntry(const std::string& tensor);
std::string PayloadEntry(const std::string& tensor);

struct DeltaHeader {
  DeltaInfo info;
  // Without views.
  std::vector<DeltaTensor> tensors;
  // XXH3-64 of each tensor's stored table; [tensors].
  std::vector<uint64_t> table_digests;
};

std::string DeltaHeaderToJson(const DeltaHeader& header);

// Errors: INVALID_ARGUMENT DELTA_INVALID.
absl::StatusOr<DeltaHeader> DeltaHeaderFromJson(const std::string& json);

}  // namespace gradwire
