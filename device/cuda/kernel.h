// SPDX-License-Identifier: Apache-2.0
// What a .cu file is written with. nvcc makes a kernel of it; a C++ compiler
// makes of the same file one that runs on the host (tests/cuda_emulator).
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstddef>

namespace gradwire {

// Queues kernel(arguments...) with `shared_bytes` of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace gradwire

#else

#include "tests/cuda_emulator/kernel.h"

#endif
