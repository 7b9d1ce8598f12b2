// SPDX-License-Identifier: Apache-2.0
#include "device/cuda/cuda_status.h"

#include <string>

#include "base/error.h"

namespace gradwire {

absl::Status CudaStatus(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return absl::OkStatus();
  // It is told here: the thread's next launch, on a stream that has not failed,
  // is not to find it again.
  (void)cudaGetLastError();
  const std::string cause =
      std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  return ErrorBuilder(absl::StatusCode::kInternal, "DEVICE_FAILED")
      .Server()
      .With("operation", operation)
      .With("cause", cause)
      .Message("the GPU failed in " + std::string(operation) + " (" + cause +
               "); start the job again, and if it fails again, look for Xid "
               "errors in the machine's kernel log");
}

}  // namespace gradwire
