// SPDX-License-Identifier: Apache-2.0
// Host memory for tiles that live in a core's cache during one op.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "base/check.h"

namespace gradwire {

// One buffer, cut into equal parts for the threads of an op. It grows to the
// largest op's need and then stays. Thread rule: Reserve is called before the
// threads start.
class Scratch {
 public:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kHugePage = 2 << 20;

  static int64_t RoundUp(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  // Room of `bytes_per_thread` bytes for each of `num_threads` threads, with
  // undefined content; the parts of an earlier call are gone.
  void Reserve(int num_threads, int64_t bytes_per_thread) {
    stride_ = RoundUp(bytes_per_thread);
    int64_t bytes = stride_ * num_threads;
    if (bytes <= capacity_) return;
    // In small pages, lines of a large tile may fall on too few cache sets, by
    // chance of where the pages lie.
    const bool huge = bytes >= kHugePage / 4;
    const int64_t alignment = huge ? kHugePage : kAlignment;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    data_.reset();
    data_.reset(static_cast<char*>(std::aligned_alloc(
        static_cast<size_t>(alignment), static_cast<size_t>(bytes))));
    GW_CHECK(data_ != nullptr);
    if (huge) {
      madvise(data_.get(), static_cast<size_t>(bytes), MADV_HUGEPAGE);
    }
    capacity_ = bytes;
  }

  char* part(int thread) const { return data_.get() + thread * stride_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t capacity_ = 0;
  int64_t stride_ = 0;
};

// Cuts a thread's part of the scratch into arrays; over a null part it only
// counts the bytes.
class ScratchCursor {
 public:
  explicit ScratchCursor(char* part) : part_(part) {}

  template <typename T>
  T* Take(int64_t n) {
    const int64_t at = used_;
    used_ += Scratch::RoundUp(n * static_cast<int64_t>(sizeof(T)));
    return part_ == nullptr ? nullptr : reinterpret_cast<T*>(part_ + at);
  }

  int64_t used() const { return used_; }

 private:
  char* part_;
  int64_t used_ = 0;
};

}  // namespace gradwire
