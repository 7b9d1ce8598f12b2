// SPDX-License-Identifier: Apache-2.0
// The ops of kernels.h on an NVIDIA GPU (sm_80 and later).
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "device/cuda/cuda_device.h"
#include "kernels/kernels.h"

namespace gradwire {

// Ops are queued on CudaStreams of `device`. Takes its scratch memory now, and
// none later.
// Errors: RESOURCE_EXHAUSTED OUT_OF_MEMORY; INTERNAL DEVICE_FAILED.
absl::StatusOr<std::unique_ptr<Kernels>> NewCudaKernels(CudaDevice& device);

}  // namespace gradwire
