// SPDX-License-Identifier: Apache-2.0
// Dynamic shared memory that knows who has written and read what, and when: a
// read of what was never written, an access beyond an array, and two accesses
// of different threads that no barrier orders, one of them a write, end the
// process. So a missing barrier shows in whatever order threads run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <source_location>
#include <type_traits>
#include <utility>
#include <vector>

#include "tests/cuda_emulator/block.h"

namespace gradwire::cuda_emulator {

// Of one block.
class SharedState {
 public:
  // `for_products`: of a block that may use products of warpgroups.
  SharedState(std::size_t bytes, bool for_products);

  std::size_t bytes() const { return memory_.size(); }
  std::byte* At(std::size_t offset) { return memory_.data() + offset; }

  // By the current thread, now.
  void Read(std::size_t offset, std::size_t bytes);
  void Write(std::size_t offset, std::size_t bytes);
  // By the products of the current thread's warpgroup, which see only what has
  // been shown to them.
  void ReadByProducts(const Moment& now, std::size_t offset, std::size_t bytes);
  void ShowToProducts();

  // cp.async: the bytes are there when the thread has waited for them.
  void CopyLater(std::size_t offset, const void* from, std::size_t bytes);
  void CommitCopies();
  // All groups of the current thread but the newest `but`.
  void FinishCopies(int but);

 private:
  // Of two bytes.
  struct Cell {
    // Threads, or one of these.
    static constexpr int16_t kNone = -1, kWarpOf = -2, kMany = -3;
    int16_t writer = kNone;
    int16_t reader = kNone;
    int16_t reading_warp = 0;
    bool pending = false;
    bool shown = false;  // to products
    uint32_t show_block = 0;
    uint32_t write_block = 0, write_warp = 0;
    uint32_t read_block = 0, read_warp = 0;
  };
  struct Copy {
    std::size_t offset;
    const void* from;
    std::size_t bytes;
  };
  struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };

  void CheckRead(const Moment& now, const Cell& cell, std::size_t offset) const;
  static void MarkRead(const Moment& now, Cell& cell);
  // By the current thread, at an offset.
  void NoteWrite(std::size_t offset, std::size_t bytes);
  void CheckWrite(const Moment& now, const Cell& cell,
                  std::size_t offset) const;
  [[noreturn]] void RefuseAt(std::size_t offset, const char* what,
                             int other) const;
  template <typename Visit>
  void ForCells(std::size_t offset, std::size_t bytes, const Visit& visit);

  std::vector<std::byte> memory_;
  std::vector<Cell> cells_;
  std::vector<Copies> copies_;  // by thread
  const bool for_products_;
  // By thread: offset and size of what it has written and not shown.
  std::vector<std::vector<std::pair<std::size_t, std::size_t>>> unshown_;
};

// Refers to an element; reads and writes are noticed.
template <typename T>
class SharedReference {
 public:
  explicit SharedReference(std::size_t offset) : offset_(offset) {}
  SharedReference(const SharedReference&) = default;

  // NOLINTNEXTLINE: reads as the element does.
  operator T() const {
    Shared().Read(offset_, sizeof(T));
    T value;
    std::memcpy(&value, Shared().At(offset_), sizeof(T));
    return value;
  }
  T operator=(T value) const {
    Shared().Write(offset_, sizeof(T));
    std::memcpy(Shared().At(offset_), &value, sizeof(T));
    return value;
  }
  T operator=(const SharedReference& other) const {
    return *this = static_cast<T>(other);
  }
  T operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
  T operator-=(T value) const { return *this = static_cast<T>(*this) - value; }
  T operator*=(T value) const { return *this = static_cast<T>(*this) * value; }

 private:
  std::size_t offset_;
};

}  // namespace gradwire::cuda_emulator

namespace gradwire {

// As in device/cuda/kernel.h.
template <typename T>
class SharedArray {
 public:
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 2 == 0);

  SharedArray() = default;

  int size() const { return size_; }
  cuda_emulator::SharedReference<T> operator[](int i) const {
    return cuda_emulator::SharedReference<T>(Offset(i, 1));
  }
  template <typename V>
  V Load(int i) const {
    const std::size_t offset = VectorOffset<V>(i);
    cuda_emulator::Shared().Read(offset, sizeof(V));
    V value;
    std::memcpy(&value, cuda_emulator::Shared().At(offset), sizeof(V));
    return value;
  }
  template <typename V>
  void Store(int i, const V& value) const {
    const std::size_t offset = VectorOffset<V>(i);
    cuda_emulator::Shared().Write(offset, sizeof(V));
    std::memcpy(cuda_emulator::Shared().At(offset), &value, sizeof(V));
  }
  SharedArray Slice(int begin, int n) const {
    if (n > 0) Offset(begin, n);
    return SharedArray(offset_ + sizeof(T) * static_cast<std::size_t>(begin),
                       n);
  }

  // In the block's shared memory.
  uint32_t Address(int i) const { return static_cast<uint32_t>(Offset(i, 1)); }

  // Of the emulator: where elements i to i + n lie.
  std::size_t Offset(int i, int n) const {
    if (i < 0 || n < 0 || i > size_ - n) {
      cuda_emulator::Refuse(
          "out of bounds: element " + std::to_string(i) +
          (n > 1 ? " and " + std::to_string(n - 1) + " more" : std::string()) +
          " of a shared array of " + std::to_string(size_));
    }
    return offset_ + sizeof(T) * static_cast<std::size_t>(i);
  }
  template <typename V>
  std::size_t VectorOffset(int i) const {
    static_assert(sizeof(V) % sizeof(T) == 0);
    const std::size_t offset = Offset(i, sizeof(V) / sizeof(T));
    if (offset % sizeof(V) != 0) {
      cuda_emulator::Refuse("misaligned: element " + std::to_string(i) +
                            " of a shared array as " +
                            std::to_string(sizeof(V)) + " bytes");
    }
    return offset;
  }

 private:
  friend class SharedMemory;
  SharedArray(std::size_t offset, int size) : offset_(offset), size_(size) {}

  std::size_t offset_ = 0;
  int size_ = 0;
};

class SharedMemory {
 public:
  template <typename T, std::size_t kAlign = 128>
  SharedArray<T> Take(int n) {
    const std::size_t offset = (used_ + kAlign - 1) / kAlign * kAlign;
    used_ = offset + sizeof(T) * static_cast<std::size_t>(n);
    if (used_ > cuda_emulator::Shared().bytes()) {
      cuda_emulator::Refuse("the kernel takes " + std::to_string(used_) +
                            " bytes of shared memory and was launched with " +
                            std::to_string(cuda_emulator::Shared().bytes()));
    }
    return SharedArray<T>(offset, n);
  }

 private:
  std::size_t used_ = 0;
};

namespace cuda_emulator {

// Copies kBytes bytes, or zeros where not `there`.
template <int kBytes, typename T>
void CopyAsync(SharedArray<T> to, int i, const T* from, bool there) {
  struct alignas(kBytes) Vector {
    std::byte bytes[kBytes];
  };
  const std::size_t offset = to.template VectorOffset<Vector>(i);
  if (there && reinterpret_cast<std::uintptr_t>(from) % kBytes != 0) {
    Refuse("misaligned: the source of an asynchronous copy");
  }
  Shared().CopyLater(offset, there ? from : nullptr, kBytes);
}

}  // namespace cuda_emulator

template <typename T>
void CopyAsync16(SharedArray<T> to, int i, const T* from, bool there = true) {
  cuda_emulator::CopyAsync<16>(to, i, from, there);
}
template <typename T>
void CopyAsync8(SharedArray<T> to, int i, const T* from, bool there = true) {
  cuda_emulator::CopyAsync<8>(to, i, from, there);
}
inline void CommitAsync() { cuda_emulator::Shared().CommitCopies(); }
template <int kBut>
void WaitAsync() {
  cuda_emulator::Shared().FinishCopies(kBut);
}

}  // namespace gradwire
