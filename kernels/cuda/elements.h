// SPDX-License-Identifier: Apache-2.0
// Elements in registers: T is float or BFloat16, arithmetic is in float32.
#pragma once

#include <cstdint>

#include "device/cuda/kernel.h"
#include "device/dtype.h"

namespace gradwire {

// Several elements that are moved at once.
template <typename T, int kN>
struct alignas(sizeof(T) * kN) Pack {
  T element[kN];
};

// As many as 16 bytes hold, the most that one instruction moves.
template <typename T>
inline constexpr int kPackOf = 16 / static_cast<int>(sizeof(T));

template <int kN, typename T>
__device__ inline Pack<T, kN> LoadPack(const T* from) {
  return *reinterpret_cast<const Pack<T, kN>*>(from);
}
template <typename T, int kN>
__device__ inline void StorePack(T* to, const Pack<T, kN>& pack) {
  StoreWhole(reinterpret_cast<Pack<T, kN>*>(to), pack);
}

// Whether rows of `columns` elements, from an aligned address on, are whole
// packs. Tensors begin wherever their owner put them, so addresses are asked,
// too.
template <typename T>
inline bool IsPacked(int64_t columns) {
  return columns % kPackOf<T> == 0;
}
template <typename T, typename... Pointers>
inline bool ArePacked(int64_t columns, Pointers... pointers) {
  return IsPacked<T>(columns) &&
         ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace gradwire
