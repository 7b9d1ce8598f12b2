// SPDX-License-Identifier: Apache-2.0
// Host memory that is made present before it is used.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace gradwire {

// The first to touch a page pays for it: a tenth of a second a GiB where the
// system has memory at hand, seconds in a virtual machine whose host has to
// give it. A thread of its own pays here, piece by piece, beside whatever else
// goes on; contents do not change, and who comes before it pays for the page
// itself. Ends early, without an error, where the kernel does not know of this
// (before Linux 5.14) or memory is short: pages then come as they are touched.
class Prefault {
 public:
  // [data, data + bytes) is anonymous memory that is there for as long as this
  // is. Of what AvailableHostBytes says `reserve_bytes` are left.
  Prefault(void* data, int64_t bytes, int64_t reserve_bytes);
  // Ends after the piece that it is at.
  ~Prefault();
  Prefault(const Prefault&) = delete;
  Prefault& operator=(const Prefault&) = delete;

  // Whether the memory that this process's CPUs are near to is one. If not, a
  // page should be touched first by who uses it, for it comes from near there.
  static bool HasOneMemory();

  // How many bytes, from the beginning on, it has made present. From any
  // thread.
  int64_t present() const { return present_.load(std::memory_order_acquire); }

 private:
  void Run(char* data, int64_t bytes, int64_t reserve_bytes);

  std::atomic<bool> stop_{false};
  std::atomic<int64_t> present_{0};
  std::thread thread_;
};

}  // namespace gradwire
