// SPDX-License-Identifier: Apache-2.0
#include "sharding/gloo/address_board.h"

#include <sched.h>
#include <sys/mman.h>

#include <cstring>
#include <string>
#include <vector>

#include "base/check.h"

namespace gradwire {

struct AddressBoard::Shared {
  static constexpr int kMaxWorld = 16;
  static constexpr int kMaxBytes = 4096;

  struct Entry {
    std::atomic<int> bytes;  // 0: not there yet
    char address[kMaxBytes];
  };
  Entry entries[kMaxWorld];
};

namespace {

void* MapShared(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  GW_CHECK(memory != MAP_FAILED);
  return memory;
}

}  // namespace

AddressBoard::AddressBoard(int world)
    : world_(world), shared_(static_cast<Shared*>(MapShared(sizeof(Shared)))) {
  GW_CHECK(1 <= world && world <= Shared::kMaxWorld);
}

AddressBoard::~AddressBoard() { munmap(shared_, sizeof(Shared)); }

ExchangeAddresses AddressBoard::ForRank(int rank) {
  return [this, rank](const std::string& mine) {
    GW_CHECK(0 < mine.size() && mine.size() <= Shared::kMaxBytes);
    Shared::Entry& entry = shared_->entries[rank];
    std::memcpy(entry.address, mine.data(), mine.size());
    entry.bytes.store(static_cast<int>(mine.size()), std::memory_order_release);
    std::vector<std::string> all;
    for (int r = 0; r < world_; ++r) {
      const Shared::Entry& other = shared_->entries[r];
      int bytes;
      while ((bytes = other.bytes.load(std::memory_order_acquire)) == 0) {
        sched_yield();
      }
      all.emplace_back(other.address, static_cast<size_t>(bytes));
    }
    return absl::StatusOr<std::vector<std::string>>(std::move(all));
  };
}

}  // namespace gradwire
