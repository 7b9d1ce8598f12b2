// SPDX-License-Identifier: Apache-2.0
// Matrix products by cuBLASLt.
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "device/cuda/cuda_device.h"
#include "kernels/cuda/gemm_algorithms.h"

namespace gradwire {

// What NVIDIA advises for sm_90; sm_80 takes less.
inline constexpr int64_t kGemmWorkspaceBytes = int64_t{32} << 20;

// Sums are in float32, inputs of f32 are not shortened (no TF32), and bf16 is
// rounded once. Which algorithm makes a product is asked of cuBLASLt once for
// all numbers of tokens of about the same size (RoundedShape), and stays for as
// long as this lives. Thread rule: one stream at a time.
class CudaGemm {
 public:
  // `device` describes the current one: what decides on algorithms.
  // `workspace`, on the device, is of kGemmWorkspaceBytes, aligned to 256
  // bytes; products on the stream share it. Errors: DEVICE_FAILED.
  static absl::StatusOr<std::unique_ptr<CudaGemm>> Create(std::string device,
                                                          void* workspace);
  ~CudaGemm();
  CudaGemm(const CudaGemm&) = delete;
  CudaGemm& operator=(const CudaGemm&) = delete;

  // Queues a product. Every shape is taken; without terms (k = 0) a sum is 0.
  // Failures are the stream's: DEVICE_FAILED. REQUIRES: c does not overlap a or
  // b; c_row = n where k = 0.
  void Run(CudaStream& stream, const CudaGemmShape& shape, const void* a,
           const void* b, void* c);

  // The algorithms chosen since the last call: a blob of gemm_algorithms.h;
  // empty if there are none.
  std::string TakeNewAlgorithms();
  // Makes them the choice of this one, but where it has made its own. Errors:
  // those of UnpackAlgorithms; DATA_LOSS for an algorithm that cuBLASLt does
  // not take for its product. Then nothing has changed.
  absl::Status AdoptAlgorithms(std::string_view blob);

 private:
  CudaGemm(std::string device, void* workspace, cublasLtHandle_t handle)
      : device_(std::move(device)), workspace_(workspace), handle_(handle) {}

  absl::StatusOr<cublasLtMatmulAlgo_t> AlgorithmFor(const CudaGemmKey& key);
  // For this shape alone.
  absl::StatusOr<cublasLtMatmulAlgo_t> Choose(const CudaGemmKey& key);
  bool Takes(const CudaGemmShape& shape, const cublasLtMatmulAlgo_t& algorithm);
  bool TakesRounded(const CudaGemmKey& key,
                    const cublasLtMatmulAlgo_t& algorithm);

  const std::string device_;
  void* const workspace_;
  const cublasLtHandle_t handle_;
  GemmAlgorithms algorithms_;
  GemmAlgorithms new_;  // of them, those not taken yet
  // What cuBLASLt has said to take the rounded shape's algorithm.
  std::set<CudaGemmKey> taken_;
};

}  // namespace gradwire
