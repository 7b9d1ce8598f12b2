// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/snapshot/diff.h"

#include <cstring>
#include <map>

namespace gradwire {
namespace {

template <typename Word>
int64_t CountWords(const void* a, const void* b, int64_t n) {
  const auto* x = static_cast<const Word*>(a);
  const auto* y = static_cast<const Word*>(b);
  int64_t changed = 0;
  for (int64_t i = 0; i < n; ++i) changed += x[i] != y[i] ? 1 : 0;
  return changed;
}

int64_t CountChanges(const TensorView& before, const TensorView& after) {
  const int64_t n = after.info.num_elements();
  if (n == 0) return 0;
  switch (DeltaElementBytes(after.info.dtype)) {
    case 1:
      return CountWords<uint8_t>(before.data, after.data, n);
    case 2:
      return CountWords<uint16_t>(before.data, after.data, n);
    case 4:
      return CountWords<uint32_t>(before.data, after.data, n);
    default:
      return CountWords<uint64_t>(before.data, after.data, n);
  }
}

}  // namespace

SnapshotDiff DiffTensors(absl::Span<const TensorView> before,
                         absl::Span<const TensorView> after) {
  std::map<std::string, const TensorView*> old_tensors;
  for (const TensorView& tensor : before) {
    old_tensors[tensor.info.name] = &tensor;
  }
  SnapshotDiff diff;
  for (const TensorView& tensor : after) {
    TensorChange change;
    change.info = tensor.info;
    const auto found = old_tensors.find(tensor.info.name);
    change.fresh =
        found == old_tensors.end() || found->second->info != tensor.info;
    change.changed = change.fresh ? tensor.info.num_elements()
                                  : CountChanges(*found->second, tensor);
    if (found != old_tensors.end()) old_tensors.erase(found);
    diff.elements += tensor.info.num_elements();
    diff.changed += change.changed;
    diff.tensors.push_back(change);
  }
  for (const auto& [name, tensor] : old_tensors) diff.removed.push_back(name);
  return diff;
}

}  // namespace gradwire
