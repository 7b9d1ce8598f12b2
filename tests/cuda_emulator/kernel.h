// SPDX-License-Identifier: Apache-2.0
// device/cuda/kernel.h on the host: a kernel is a function that is called for
// every thread of the grid, one after another. Kernels whose threads wait for
// each other do not compile against it.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstddef>

#include "tests/cuda_emulator/streams.h"

inline thread_local uint3 threadIdx;
inline thread_local uint3 blockIdx;
inline thread_local dim3 blockDim;
inline thread_local dim3 gridDim;

namespace gradwire {
namespace cuda_emulator {

// Calls `thread` for each thread of each block of the grid.
template <typename Thread>
void RunGrid(dim3 grid, dim3 block, const Thread& thread) {
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z) {
          for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y) {
            for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
              thread();
            }
          }
        }
      }
    }
  }
}

// As the hardware has them.
inline bool Fits(dim3 grid, dim3 block) {
  return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 2147483647u &&
         grid.y <= 65535 && grid.z <= 65535 && block.x > 0 && block.y > 0 &&
         block.z > 0 && block.z <= 64 && block.x * block.y * block.z <= 1024;
}

}  // namespace cuda_emulator

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (!cuda_emulator::Fits(grid, block) || shared_bytes > 0) {
    return cudaErrorInvalidConfiguration;
  }
  cuda_emulator::StreamOf(stream).Add([=] {
    cuda_emulator::RunGrid(grid, block, [&] { kernel(arguments...); });
  });
  return cudaSuccess;
}

}  // namespace gradwire
