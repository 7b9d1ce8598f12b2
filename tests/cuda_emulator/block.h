// SPDX-License-Identifier: Apache-2.0
// A block of threads on the host: each thread is a fiber, all of them on the OS
// thread of the stream, which go on in turns where they wait for each other.
// What the programming model leaves undefined ends the process with a word:
// threads that wait at different places, a thread that ends while others wait,
// and races in shared memory (shared_memory.h).
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

// As in a kernel.
inline thread_local uint3 threadIdx;
inline thread_local uint3 blockIdx;
inline thread_local dim3 blockDim;
inline thread_local dim3 gridDim;

namespace gradwire::cuda_emulator {

constexpr int kWarp = 32;
// Of dynamic shared memory: what every GPU since sm_80 has.
constexpr std::size_t kMaxSharedBytes = std::size_t{99} << 10;
constexpr std::size_t kMaxSharedBytesOfSm90 = std::size_t{227} << 10;

class Products;
class SharedState;

// Ends the process; names block and thread. `where` is of the source, or null.
[[noreturn]] void Refuse(const std::string& what,
                         const std::source_location* where = nullptr);

// Whether the hardware takes a grid of this form.
bool Fits(dim3 grid, dim3 block);

// Runs `thread` for each thread of each block, in an order that differs from
// block to block. Global variables are the kernel's.
void RunGrid(dim3 grid, dim3 block, std::size_t shared_bytes,
             const std::function<void()>& thread);

// The same of threads that may use products of warpgroups (products.h).
void RunGridOfWarpgroups(dim3 grid, dim3 block, std::size_t shared_bytes,
                         const std::function<void()>& thread);

// The same for threads that do not wait for each other: one after another.
void RunIndependentGrid(dim3 grid, dim3 block,
                        const std::function<void()>& thread);

// Whether `address` is of memory that cudaMalloc gave (runtime.cc).
bool IsDeviceMemory(const void* address);

// ---- Of the block that runs on this thread ----------------------------------

// Index of the thread within its block.
int ThreadNumber();

// Returns when all threads of the block have come to the same place.
void WaitForBlock(const std::source_location& where);

// Gives `bytes` bytes to the other lanes of the warp, and returns when all have
// done so at the same place: 32 slots of kSlotBytes each, which stay until the
// next call. Orders no memory.
constexpr std::size_t kSlotBytes = 32;
const std::byte* ExchangeInWarp(const void* value, std::size_t bytes,
                                const std::source_location& where);

// Orders memory within the warp.
void WaitForWarp(const std::source_location& where);

SharedState& Shared();
Products& ProductsOfBlock();

// The current thread, and how often the block, and it with its warp, have
// waited.
struct Moment {
  int thread;
  uint32_t block_epoch;
  uint32_t warp_epoch;
};
Moment Now();

}  // namespace gradwire::cuda_emulator
