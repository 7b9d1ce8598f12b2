// SPDX-License-Identifier: Apache-2.0
// First-fit ranges of the activation arena. Retained micro-batches come and go
// in any order, so this is not a stack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>

namespace gradwire {

class RangeAllocator {
 public:
  explicit RangeAllocator(int64_t capacity) : capacity_(capacity) {}

  // The offset of a free range, or -1.
  int64_t Take(int64_t bytes) {
    int64_t at = 0;
    for (const auto& [begin, size] : taken_) {
      if (begin - at >= bytes) break;
      at = begin + size;
    }
    if (capacity_ - at < bytes) return -1;
    taken_[at] = bytes;
    peak_ = std::max(peak_, at + bytes);
    return at;
  }
  void Give(int64_t offset) { taken_.erase(offset); }

  // The end of the highest range so far.
  int64_t Peak() const { return peak_; }

  // The largest range that Take would grant.
  int64_t LargestFree() const {
    int64_t at = 0, best = 0;
    for (const auto& [begin, size] : taken_) {
      if (begin - at > best) best = begin - at;
      at = begin + size;
    }
    return capacity_ - at > best ? capacity_ - at : best;
  }

 private:
  const int64_t capacity_;
  int64_t peak_ = 0;
  std::map<int64_t, int64_t> taken_;
};

}  // namespace gradwire
