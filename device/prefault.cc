// SPDX-License-Identifier: Apache-2.0
#include "device/prefault.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>

#include "device/cpu_device.h"

// Of the kernel, which older headers do not know.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace gradwire {
namespace {

// A huge page: for as long as one piece takes, nobody else in the process maps
// or unmaps memory.
constexpr uintptr_t kPiece = 2 << 20;

// Whether a list as the kernel writes it ("0-3,8") has one of them.
bool HasOneOf(std::istream& list, const cpu_set_t& cpus) {
  int first = 0;
  while (list >> first) {
    int last = first;
    if (list.peek() == '-') list.ignore() >> last;
    for (int cpu = first; cpu <= std::min(last, CPU_SETSIZE - 1); ++cpu) {
      if (CPU_ISSET(cpu, &cpus)) return true;
    }
    if (list.peek() == ',') list.ignore();
  }
  return false;
}

}  // namespace

bool Prefault::HasOneMemory() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  if (sched_getaffinity(0, sizeof(cpus), &cpus) != 0) return false;
  // Numbers may have gaps.
  constexpr int kMostNodes = 1024;
  int nodes = 0;
  for (int node = 0; node < kMostNodes; ++node) {
    std::ifstream list("/sys/devices/system/node/node" + std::to_string(node) +
                       "/cpulist");
    if (list && HasOneOf(list, cpus)) ++nodes;
  }
  // None: the kernel does not tell them apart.
  return nodes <= 1;
}

Prefault::Prefault(void* data, int64_t bytes, int64_t reserve_bytes)
    : thread_([this, data, bytes, reserve_bytes] {
        Run(static_cast<char*>(data), bytes, reserve_bytes);
      }) {}

Prefault::~Prefault() {
  stop_.store(true, std::memory_order_relaxed);
  thread_.join();
}

void Prefault::Run(char* data, int64_t bytes, int64_t reserve_bytes) {
  // Whole pages: what lies in the first and the last besides is the owner's.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = first + static_cast<uintptr_t>(bytes);
  const uintptr_t last_page = (end + page - 1) / page * page;
  uintptr_t at = first / page * page;
  while (at < end) {
    // Where there is none left the kernel would rather end the process than
    // refuse.
    if (stop_.load(std::memory_order_relaxed) ||
        AvailableHostBytes() < reserve_bytes + static_cast<int64_t>(kPiece)) {
      return;
    }
    const uintptr_t next = std::min(at + kPiece, last_page);
    if (madvise(reinterpret_cast<void*>(at), next - at, MADV_POPULATE_WRITE) !=
        0) {
      return;
    }
    at = next;
    present_.store(static_cast<int64_t>(std::min(at, end) - first),
                   std::memory_order_release);
  }
}

}  // namespace gradwire
