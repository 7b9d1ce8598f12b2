// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/cuda_kernels.h"

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "base/environment.h"
#include "base/status.h"
#include "device/cuda/cuda_status.h"
#include "kernels/cuda/attention_tile_cache.h"
#include "kernels/cuda/cuda_kernels_impl.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/warpgroup_check.h"

namespace gradwire {

CudaKernels::CudaKernels(std::string description, bool warpgroups,
                         std::unique_ptr<DeviceBuffer> scratch,
                         std::unique_ptr<DeviceBuffer> tiles,
                         std::unique_ptr<CudaGemm> gemm)
    : description_(std::move(description)),
      warpgroups_(warpgroups),
      scratch_(std::move(scratch)),
      tiles_(std::move(tiles)),
      attention_tiles_(std::make_unique<AttentionTileCache>(tiles_->data())),
      gemm_(std::move(gemm)) {}
CudaKernels::~CudaKernels() = default;

std::string CudaKernels::description() const { return description_; }

// cuBLASLt chooses its algorithm by the number of rows.
bool CudaKernels::RowsHaveTheirOwnBits(DType) const { return false; }

std::string CudaKernels::TakeChoices() { return gemm_->TakeNewAlgorithms(); }

absl::Status CudaKernels::AdoptChoices(std::string_view choices) {
  return gemm_->AdoptAlgorithms(choices);
}

namespace {

absl::StatusOr<int> Attribute(const CudaDevice& device,
                              cudaDeviceAttr attribute) {
  int value = 0;
  GW_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetAttribute(&value, attribute, device.index()),
                 "asking for what the GPU is"));
  return value;
}

// Of a GPU of sm_90: whether attention may use its products of warpgroups.
absl::StatusOr<bool> HasWarpgroups(float* room) {
  // For one whose driver or compiler gets them wrong in a way that ends the
  // process that tries.
  if (IsSwitchedOn("GRADWIRE_NO_WARPGROUPS")) return false;
  WarpgroupCheck check;
  const cudaError_t error = CheckWarpgroups(room, check);
  // Of binaries without code for sm_90a.
  if (error == cudaErrorNoKernelImageForDevice ||
      error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return false;
  }
  GW_RETURN_IF_ERROR(CudaStatus(error, "checking products of warpgroups"));
  return check.Right();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Kernels>> NewCudaKernels(CudaDevice& device) {
  GW_ASSIGN_OR_RETURN(const int major,
                      Attribute(device, cudaDevAttrComputeCapabilityMajor));
  GW_ASSIGN_OR_RETURN(const int minor,
                      Attribute(device, cudaDevAttrComputeCapabilityMinor));
  GW_ASSIGN_OR_RETURN(const int multiprocessors,
                      Attribute(device, cudaDevAttrMultiProcessorCount));
  GW_ASSIGN_OR_RETURN(std::unique_ptr<DeviceBuffer> scratch,
                      device.Allocate(kScratchBytes));
  std::string description =
      "cuda sm_" + std::to_string(major) + std::to_string(minor) + ", " +
      std::to_string(multiprocessors) + " multiprocessors";
  bool warpgroups = false;
  if (major == 9) {
    static_assert(kWarpgroupCheckFloats * sizeof(float) <= kScratchBytes);
    GW_ASSIGN_OR_RETURN(warpgroups,
                        HasWarpgroups(static_cast<float*>(scratch->data())));
    // Attention has other bits without them.
    if (!warpgroups) description += ", no warpgroups";
  }
  GW_ASSIGN_OR_RETURN(
      std::unique_ptr<CudaGemm> gemm,
      CudaGemm::Create(description, static_cast<char*>(scratch->data()) +
                                        kScratchBytes - kGemmWorkspaceBytes));
  GW_ASSIGN_OR_RETURN(std::unique_ptr<DeviceBuffer> tiles,
                      device.Allocate(AttentionTileCache::kBytes));
  return std::make_unique<CudaKernels>(description, warpgroups,
                                       std::move(scratch), std::move(tiles),
                                       std::move(gemm));
}

}  // namespace gradwire
