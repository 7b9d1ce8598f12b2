// SPDX-License-Identifier: Apache-2.0
// device/cuda/kernel.h on the host: the same names, for threads that are fibers
// (block.h). Warps are whole, and all lanes take part in what a warp does.
#pragma once

#include <cuda_runtime_api.h>
#include <strings.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>

#include "device/cuda/launch_record.h"
#include "device/dtype.h"
#include "tests/cuda_emulator/block.h"
#include "tests/cuda_emulator/shared_memory.h"
#include "tests/cuda_emulator/streams.h"

#undef __launch_bounds__
#define __launch_bounds__(...)

// ---- CUDA's own names -------------------------------------------------------

inline void __syncthreads(
    std::source_location where = std::source_location::current()) {
  gradwire::cuda_emulator::WaitForBlock(where);
}

namespace gradwire::cuda_emulator {

inline void CheckMask(unsigned mask, const std::source_location& where) {
  if (mask != 0xffffffffu) Refuse("not all lanes are named", &where);
}

template <typename T>
T FromLane(T value, int lane, const std::source_location& where) {
  const std::byte* slots = ExchangeInWarp(&value, sizeof(T), where);
  std::memcpy(&value, slots + static_cast<std::size_t>(lane) * kSlotBytes,
              sizeof(T));
  return value;
}

inline int Lane() { return ThreadNumber() % kWarp; }

}  // namespace gradwire::cuda_emulator

inline void __syncwarp(
    unsigned mask = 0xffffffffu,
    std::source_location where = std::source_location::current()) {
  gradwire::cuda_emulator::CheckMask(mask, where);
  gradwire::cuda_emulator::WaitForWarp(where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane,
              std::source_location where = std::source_location::current()) {
  gradwire::cuda_emulator::CheckMask(mask, where);
  return gradwire::cuda_emulator::FromLane(value, lane % 32, where);
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int lanes,
    std::source_location where = std::source_location::current()) {
  gradwire::cuda_emulator::CheckMask(mask, where);
  return gradwire::cuda_emulator::FromLane(
      value, (gradwire::cuda_emulator::Lane() ^ lanes) % 32, where);
}

template <typename T>
T __shfl_down_sync(
    unsigned mask, T value, int lanes,
    std::source_location where = std::source_location::current()) {
  gradwire::cuda_emulator::CheckMask(mask, where);
  const int lane = gradwire::cuda_emulator::Lane();
  return gradwire::cuda_emulator::FromLane(
      value, lane + lanes < 32 ? lane + lanes : lane, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes,
                 std::source_location where = std::source_location::current()) {
  gradwire::cuda_emulator::CheckMask(mask, where);
  const int lane = gradwire::cuda_emulator::Lane();
  return gradwire::cuda_emulator::FromLane(
      value, lane >= lanes ? lane - lanes : lane, where);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    std::source_location where = std::source_location::current()) {
  using namespace gradwire::cuda_emulator;
  CheckMask(mask, where);
  const std::byte* slots = ExchangeInWarp(&predicate, sizeof(predicate), where);
  unsigned bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    int one;
    std::memcpy(&one, slots + static_cast<std::size_t>(lane) * kSlotBytes,
                sizeof(one));
    if (one != 0) bits |= 1u << lane;
  }
  return bits;
}

inline int __any_sync(
    unsigned mask, int predicate,
    std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}

inline int __all_sync(
    unsigned mask, int predicate,
    std::source_location where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) == 0xffffffffu;
}

// Blocks run one after another, and threads until they wait: what is left to
// exclude is kernels of other streams.
inline int atomicAdd(int* address, int value) {
  return std::atomic_ref<int>(*address).fetch_add(value);
}
inline unsigned long long atomicAdd(unsigned long long* address,
                                    unsigned long long value) {
  return std::atomic_ref<unsigned long long>(*address).fetch_add(value);
}

inline int __ffs(int bits) { return ffs(bits); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

// ---- gradwire's -------------------------------------------------------------

namespace gradwire {
namespace cuda_emulator {

template <typename T>
bool IsOfDevice(const T& argument) {
  if constexpr (std::is_pointer_v<T>) {
    return argument == nullptr || IsDeviceMemory(argument);
  }
  return true;
}

}  // namespace cuda_emulator

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  const auto launch = [=](cudaStream_t to) {
    if (!cuda_emulator::Fits(grid, block) ||
        shared_bytes > cuda_emulator::kMaxSharedBytes) {
      return cudaErrorInvalidConfiguration;
    }
    // A GPU would fault.
    if (!(cuda_emulator::IsOfDevice(arguments) && ...)) {
      return cudaErrorIllegalAddress;
    }
    cuda_emulator::StreamOf(to).Add([=] {
      cuda_emulator::RunGrid(grid, block, shared_bytes,
                             [&] { kernel(arguments...); });
    });
    return cudaGetLastError();
  };
  return QueueKernel(kernel, grid, block, shared_bytes, stream, launch,
                     arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchIndependent(void (*kernel)(Parameters...), dim3 grid,
                              dim3 block, cudaStream_t stream,
                              Arguments... arguments) {
  const auto launch = [=](cudaStream_t to) {
    if (!cuda_emulator::Fits(grid, block)) return cudaErrorInvalidConfiguration;
    if (!(cuda_emulator::IsOfDevice(arguments) && ...)) {
      return cudaErrorIllegalAddress;
    }
    cuda_emulator::StreamOf(to).Add([=] {
      cuda_emulator::RunIndependentGrid(grid, block,
                                        [&] { kernel(arguments...); });
    });
    return cudaGetLastError();
  };
  return QueueKernel(kernel, grid, block, 0, stream, launch, arguments...);
}

// As in device/cuda/kernel.h.
inline void LoadMatrix(uint32_t& r, const std::byte* slots, int matrix,
                       bool transposed) {
  // Lane l's row of matrix m is what lane 8 m + l gave the address of.
  const int lane = cuda_emulator::Lane();
  uint16_t halves[2];
  for (int i = 0; i < 2; ++i) {
    const int row = transposed ? lane % 4 * 2 + i : lane / 4;
    const int column = transposed ? lane / 4 : lane % 4 * 2 + i;
    std::memcpy(&halves[i],
                slots +
                    static_cast<std::size_t>(matrix * 8 + row) *
                        cuda_emulator::kSlotBytes +
                    static_cast<std::size_t>(column) * 2,
                2);
  }
  r = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
}

template <bool kTransposed, int kMatrices, typename T>
void LoadMatrices(uint32_t (&r)[kMatrices], SharedArray<T> from, int i,
                  const std::source_location& where) {
  static_assert(sizeof(T) == 2);
  struct alignas(16) Row {
    uint16_t elements[8];
  };
  // Addresses of lanes beyond the matrices are not looked at.
  Row row = {};
  if (cuda_emulator::Lane() < 8 * kMatrices) row = from.template Load<Row>(i);
  const std::byte* slots =
      cuda_emulator::ExchangeInWarp(&row, sizeof(row), where);
  for (int m = 0; m < kMatrices; ++m) LoadMatrix(r[m], slots, m, kTransposed);
}

template <typename T>
void LdMatrixX4(uint32_t (&r)[4], SharedArray<T> from, int i,
                std::source_location where = std::source_location::current()) {
  LoadMatrices<false>(r, from, i, where);
}
template <typename T>
void LdMatrixX4Transposed(
    uint32_t (&r)[4], SharedArray<T> from, int i,
    std::source_location where = std::source_location::current()) {
  LoadMatrices<true>(r, from, i, where);
}
template <typename T>
void LdMatrixX2(uint32_t (&r)[2], SharedArray<T> from, int i,
                std::source_location where = std::source_location::current()) {
  LoadMatrices<false>(r, from, i, where);
}
template <typename T>
void LdMatrixX2Transposed(
    uint32_t (&r)[2], SharedArray<T> from, int i,
    std::source_location where = std::source_location::current()) {
  LoadMatrices<true>(r, from, i, where);
}

inline void MmaBf16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
    std::source_location where = std::source_location::current()) {
  struct Fragments {
    uint32_t a[4];
    uint32_t b[2];
  } own;
  std::memcpy(own.a, a, sizeof(a));
  std::memcpy(own.b, b, sizeof(b));
  const std::byte* slots =
      cuda_emulator::ExchangeInWarp(&own, sizeof(own), where);
  // The lane's elements come from two rows of a and two columns of b, each of
  // which four neighbouring lanes hold.
  double of_a[2][16], of_b[2][16];
  const auto decode = [](uint32_t pair, double* to) {
    to[0] = static_cast<double>(std::bit_cast<float>(pair << 16));
    to[1] = static_cast<double>(std::bit_cast<float>(pair & 0xffff0000u));
  };
  const int lane = cuda_emulator::Lane();
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      const auto fragments_of = [&](int other) {
        Fragments f;
        std::memcpy(
            &f,
            slots + static_cast<std::size_t>(other) * cuda_emulator::kSlotBytes,
            sizeof(f));
        return f;
      };
      const Fragments row = fragments_of(lane / 4 * 4 + j);
      decode(row.a[i], of_a[i] + 2 * j);
      decode(row.a[i + 2], of_a[i] + 8 + 2 * j);
      const Fragments column = fragments_of((lane % 4 * 2 + i) * 4 + j);
      decode(column.b[0], of_b[i] + 2 * j);
      decode(column.b[1], of_b[i] + 8 + 2 * j);
    }
  }
  // Row g or g + 8, column 2 (lane % 4) or the next.
  for (int i = 0; i < 4; ++i) {
    double sum = 0;
    for (int k = 0; k < 16; ++k) sum += of_a[i / 2][k] * of_b[i % 2][k];
    d[i] = static_cast<float>(static_cast<double>(d[i]) + sum);
  }
}

template <typename V>
void StoreWhole(V* to, const V& value) {
  if (reinterpret_cast<std::uintptr_t>(to) % sizeof(V) != 0) {
    cuda_emulator::Refuse("misaligned: a store of " +
                          std::to_string(sizeof(V)) + " bytes");
  }
  *to = value;
}

inline uint32_t PackBf16(float low, float high) {
  return BFloat16(low).bits | static_cast<uint32_t>(BFloat16(high).bits) << 16;
}

inline float Exp2Approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

}  // namespace gradwire
