// SPDX-License-Identifier: Apache-2.0
// What has changed between two snapshots, tensor by tensor.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/delta/encode.h"

namespace gradwire {

struct TensorChange {
  TensorInfo info;
  // Elements whose bits differ; all of a tensor that was not there before, or
  // not with this dtype and shape.
  int64_t changed = 0;
  bool fresh = false;
};

struct SnapshotDiff {
  std::vector<TensorChange> tensors;  // of `after`, in its order
  std::vector<std::string> removed;   // of `before` alone, by name
  int64_t elements = 0, changed = 0;  // of `after`
};

// Thread rule: pure function.
SnapshotDiff DiffTensors(absl::Span<const TensorView> before,
                         absl::Span<const TensorView> after);

}  // namespace gradwire
