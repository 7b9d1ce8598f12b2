// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/cuda_kernels.h"

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <utility>

#include "base/status.h"
#include "device/cuda/cuda_status.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/gemm.h"

namespace gradwire {

CudaKernels::CudaKernels(std::string description,
                         std::unique_ptr<DeviceBuffer> scratch,
                         std::unique_ptr<CudaGemm> gemm)
    : description_(std::move(description)),
      scratch_(std::move(scratch)),
      gemm_(std::move(gemm)) {}
CudaKernels::~CudaKernels() = default;

std::string CudaKernels::description() const { return description_; }

// cuBLASLt chooses its algorithm by the number of rows.
bool CudaKernels::RowsHaveTheirOwnBits(DType) const { return false; }

std::string CudaKernels::TakeChoices() { return gemm_->TakeNewAlgorithms(); }

absl::Status CudaKernels::AdoptChoices(std::string_view choices) {
  return gemm_->AdoptAlgorithms(choices);
}

absl::StatusOr<std::unique_ptr<Kernels>> NewCudaKernels(CudaDevice& device) {
  int major = 0, minor = 0;
  GW_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetAttribute(
                     &major, cudaDevAttrComputeCapabilityMajor, device.index()),
                 "asking for the compute capability"));
  GW_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetAttribute(
                     &minor, cudaDevAttrComputeCapabilityMinor, device.index()),
                 "asking for the compute capability"));
  GW_ASSIGN_OR_RETURN(std::unique_ptr<DeviceBuffer> scratch,
                      device.Allocate(kScratchBytes));
  int multiprocessors = 0;
  GW_RETURN_IF_ERROR(CudaStatus(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                             device.index()),
      "asking for the number of multiprocessors"));
  const std::string description =
      "cuda sm_" + std::to_string(major) + std::to_string(minor) + ", " +
      std::to_string(multiprocessors) + " multiprocessors";
  GW_ASSIGN_OR_RETURN(
      std::unique_ptr<CudaGemm> gemm,
      CudaGemm::Create(description, static_cast<char*>(scratch->data()) +
                                        kScratchBytes - kGemmWorkspaceBytes));
  return std::make_unique<CudaKernels>(description, std::move(scratch),
                                       std::move(gemm));
}

}  // namespace gradwire
