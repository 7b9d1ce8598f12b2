// SPDX-License-Identifier: Apache-2.0
// What CUDA's runtime answers, in gradwire's words.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

namespace gradwire {

// OK for cudaSuccess; else INTERNAL DEVICE_FAILED (operation, cause): most of
// CUDA's errors poison the process's context, which then must be started again.
// `operation` is what was asked for, in a few words.
absl::Status CudaStatus(cudaError_t error, const char* operation);

}  // namespace gradwire
