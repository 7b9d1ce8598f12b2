// SPDX-License-Identifier: Apache-2.0
// device/cuda/warpgroup.h on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "tests/cuda_emulator/block.h"
#include "tests/cuda_emulator/emulated_gpu.h"
#include "tests/cuda_emulator/kernel.h"
#include "tests/cuda_emulator/products.h"

namespace gradwire {

inline constexpr bool kHasWarpgroups = true;

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchWarpgroups(void (*kernel)(Parameters...), dim3 grid,
                             dim3 block, std::size_t shared_bytes,
                             cudaStream_t stream, Arguments... arguments) {
  const auto launch = [=](cudaStream_t to) {
    if (!cuda_emulator::Fits(grid, block) ||
        shared_bytes > cuda_emulator::kMaxSharedBytesOfSm90) {
      return cudaErrorInvalidConfiguration;
    }
    if (!(cuda_emulator::IsOfDevice(arguments) && ...)) {
      return cudaErrorIllegalAddress;
    }
    // What is compiled for others is empty.
    if (cuda_emulator::ComputeCapability() != 90) return cudaGetLastError();
    cuda_emulator::StreamOf(to).Add([=] {
      cuda_emulator::RunGridOfWarpgroups(grid, block, shared_bytes,
                                         [&] { kernel(arguments...); });
    });
    return cudaGetLastError();
  };
  return QueueKernel(kernel, grid, block, shared_bytes, stream, launch,
                     arguments...);
}

inline void ShowToProducts() { cuda_emulator::Shared().ShowToProducts(); }
inline void BeginProducts(
    std::source_location where = std::source_location::current()) {
  cuda_emulator::ProductsOfBlock().Begin(where);
}
inline void CommitProducts(
    std::source_location where = std::source_location::current()) {
  cuda_emulator::ProductsOfBlock().Commit(where);
}
template <int kBut>
void WaitProducts(
    std::source_location where = std::source_location::current()) {
  cuda_emulator::ProductsOfBlock().Wait(kBut, where);
}
inline void ComputeBeforeWaiting(float value) {
  if (value < 0) cuda_emulator::Refuse("a negative value is waited for");
}
template <int kTiles>
void HoldSums(WarpgroupSums<kTiles>&) {}

template <int kTiles>
void MultiplyRows(
    WarpgroupSums<kTiles>& d, uint64_t a, uint64_t b, bool add,
    std::source_location where = std::source_location::current()) {
  static_assert(kTiles == 8 || kTiles == 16);
  cuda_emulator::ProductsOfBlock().Issue(
      {.tiles = kTiles, .add = add, .a = a, .b = b}, d[0], nullptr, where);
}

template <int kTiles>
void MultiplyColumns(
    WarpgroupSums<kTiles>& d, const uint32_t (&a)[4], uint64_t b, bool add,
    std::source_location where = std::source_location::current()) {
  static_assert(kTiles == 8 || kTiles == 16);
  cuda_emulator::ProductsOfBlock().Issue({.tiles = kTiles,
                                          .add = add,
                                          .a_in_registers = true,
                                          .b = b,
                                          .b_by_columns = true},
                                         d[0], a, where);
}

}  // namespace gradwire
