// SPDX-License-Identifier: Apache-2.0
// Bytes that grow at the end, and are not zeroed before they are written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace gradwire {

class ByteBuffer {
 public:
  const uint8_t* data() const { return bytes_.get(); }
  int64_t size() const { return size_; }
  void Clear() { size_ = 0; }

  // Where the next bytes go, with room for `bytes`; Add says how many are kept.
  // Moves what is there already.
  uint8_t* Room(int64_t bytes) {
    if (size_ + bytes > capacity_) Grow(size_ + bytes);
    return bytes_.get() + size_;
  }
  void Add(int64_t bytes) { size_ += bytes; }

  void Append(const void* from, int64_t bytes) {
    if (bytes == 0) return;
    std::memcpy(Room(bytes), from, static_cast<size_t>(bytes));
    Add(bytes);
  }

 private:
  void Grow(int64_t least) {
    capacity_ = std::max(least, 2 * capacity_);
    auto grown = std::make_unique_for_overwrite<uint8_t[]>(
        static_cast<size_t>(capacity_));
    if (size_ > 0) {
      std::memcpy(grown.get(), bytes_.get(), static_cast<size_t>(size_));
    }
    bytes_ = std::move(grown);
  }

  std::unique_ptr<uint8_t[]> bytes_;
  int64_t size_ = 0;
  int64_t capacity_ = 0;
};

}  // namespace gradwire
