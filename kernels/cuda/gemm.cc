// SPDX-License-Identifier: Apache-2.0
// cuBLASLt takes matrices by columns. What is row-major is by columns its own
// transposed, so c^T = b^T a^T is asked for: its first operand is our b.
#include "kernels/cuda/gemm.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "device/cuda/launch_record.h"

namespace gradwire {
namespace {

// A model has some dozen products, each at some hundred numbers of tokens.
// Beyond this many the choice, which cuBLASLt makes alike, is made anew.
constexpr size_t kMaxAlgorithms = size_t{1} << 13;

absl::Status CublasStatus(cublasStatus_t status, const char* operation) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string cause = std::string(cublasLtGetStatusName(status)) + ": " +
                            cublasLtGetStatusString(status);
  return ErrorBuilder(absl::StatusCode::kInternal, "DEVICE_FAILED")
      .Server()
      .With("operation", operation)
      .With("cause", cause)
      .Message("the GPU failed in " + std::string(operation) + " (" + cause +
               "); start the job again, and if it fails again, look for Xid "
               "errors in the machine's kernel log");
}

cudaDataType TypeOf(DType dtype) {
  GW_CHECK(dtype == DType::kF32 || dtype == DType::kBF16);
  return dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F;
}

uint32_t AlignOf(const void* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address) | kGemmMaxAlign;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// A product in cuBLASLt's words. They own nothing and are quick to write.
struct Problem {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c;
};

absl::Status Describe(const CudaGemmShape& s, Problem* problem) {
  Problem& p = *problem;
  const char* operation = "describing a product";
  GW_RETURN_IF_ERROR(CublasStatus(
      cublasLtMatmulDescInit(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
      operation));
  const int32_t of_b = s.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const int32_t of_a = s.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  GW_RETURN_IF_ERROR(CublasStatus(
      cublasLtMatmulDescSetAttribute(&p.product, CUBLASLT_MATMUL_DESC_TRANSA,
                                     &of_b, sizeof(of_b)),
      operation));
  GW_RETURN_IF_ERROR(CublasStatus(
      cublasLtMatmulDescSetAttribute(&p.product, CUBLASLT_MATMUL_DESC_TRANSB,
                                     &of_a, sizeof(of_a)),
      operation));
  const auto layout = [&](cublasLtMatrixLayoutOpaque_t* to, DType dtype,
                          int64_t rows, int64_t columns, int64_t row) {
    return CublasStatus(cublasLtMatrixLayoutInit(
                            to, TypeOf(dtype), static_cast<uint64_t>(columns),
                            static_cast<uint64_t>(rows), row),
                        operation);
  };
  GW_RETURN_IF_ERROR(layout(&p.a, s.ab, s.a_transposed ? s.k : s.m,
                            s.a_transposed ? s.m : s.k, s.a_row));
  GW_RETURN_IF_ERROR(layout(&p.b, s.ab, s.b_transposed ? s.n : s.k,
                            s.b_transposed ? s.k : s.n, s.b_row));
  return layout(&p.c, s.c, s.m, s.n, s.c_row);
}

absl::Status Prefer(const CudaGemmKey& key,
                    cublasLtMatmulPreferenceOpaque_t* preference) {
  const char* operation = "choosing a product's algorithm";
  GW_RETURN_IF_ERROR(
      CublasStatus(cublasLtMatmulPreferenceInit(preference), operation));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute,
                       auto value) {
    return CublasStatus(cublasLtMatmulPreferenceSetAttribute(
                            preference, attribute, &value, sizeof(value)),
                        operation);
  };
  GW_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                         uint64_t{kGemmWorkspaceBytes}));
  // Parts of a sum must not be rounded to bf16.
  GW_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                         uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE}));
  GW_RETURN_IF_ERROR(
      set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b_align));
  GW_RETURN_IF_ERROR(
      set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a_align));
  GW_RETURN_IF_ERROR(
      set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c_align));
  return set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c_align);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaGemm>> CudaGemm::Create(std::string device,
                                                           void* workspace) {
  cublasLtHandle_t handle = nullptr;
  GW_RETURN_IF_ERROR(CublasStatus(cublasLtCreate(&handle), "making cuBLASLt"));
  return std::unique_ptr<CudaGemm>(
      new CudaGemm(std::move(device), workspace, handle));
}

CudaGemm::~CudaGemm() { cublasLtDestroy(handle_); }

bool CudaGemm::Takes(const CudaGemmShape& shape,
                     const cublasLtMatmulAlgo_t& algorithm) {
  Problem p;
  if (!Describe(shape, &p).ok()) return false;
  cublasLtMatmulHeuristicResult_t result = {};
  return cublasLtMatmulAlgoCheck(handle_, &p.product, &p.b, &p.a, &p.c, &p.c,
                                 &algorithm,
                                 &result) == CUBLAS_STATUS_SUCCESS &&
         result.workspaceSize <= kGemmWorkspaceBytes;
}

// Asked for once: a step has hundreds of products of few shapes.
bool CudaGemm::TakesRounded(const CudaGemmKey& key,
                            const cublasLtMatmulAlgo_t& algorithm) {
  if (taken_.contains(key)) return true;
  if (!Takes(key.shape, algorithm)) return false;
  if (taken_.size() >= kMaxAlgorithms) taken_.clear();
  taken_.insert(key);
  return true;
}

absl::StatusOr<cublasLtMatmulAlgo_t> CudaGemm::AlgorithmFor(
    const CudaGemmKey& key) {
  CudaGemmKey rounded = key;
  rounded.shape = RoundedShape(key.shape);
  if (rounded != key) {
    // Chosen before because the other one is not taken.
    const auto own = algorithms_.find(key);
    if (own != algorithms_.end()) return own->second;
  }
  const auto found = algorithms_.find(rounded);
  absl::StatusOr<cublasLtMatmulAlgo_t> algorithm =
      found != algorithms_.end() ? found->second : Choose(rounded);
  if (rounded == key || (algorithm.ok() && TakesRounded(key, *algorithm))) {
    return algorithm;
  }
  return Choose(key);
}

absl::StatusOr<cublasLtMatmulAlgo_t> CudaGemm::Choose(const CudaGemmKey& key) {
  Problem p;
  GW_RETURN_IF_ERROR(Describe(key.shape, &p));
  cublasLtMatmulPreferenceOpaque_t preference;
  GW_RETURN_IF_ERROR(Prefer(key, &preference));
  cublasLtMatmulHeuristicResult_t best = {};
  int count = 0;
  cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, &p.product, &p.b, &p.a, &p.c,
                                     &p.c, &preference, 1, &best, &count);
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = count == 0 ? CUBLAS_STATUS_NOT_SUPPORTED : best.state;
  }
  GW_RETURN_IF_ERROR(CublasStatus(status, "choosing a product's algorithm"));
  if (algorithms_.size() < kMaxAlgorithms) {
    algorithms_.emplace(key, best.algo);
    new_.emplace(key, best.algo);
  }
  return best.algo;
}

void CudaGemm::Run(CudaStream& stream, const CudaGemmShape& shape,
                   const void* a, const void* b, void* c) {
  if (!stream.ok() || shape.m == 0 || shape.n == 0) return;
  if (shape.k == 0) {
    GW_CHECK(shape.c_row == shape.n);
    if (shape.accumulate) return;
    const int64_t bytes = shape.m * shape.n * DTypeBytes(shape.c);
    stream.Check(QueueMemset(c, 0, bytes, stream.get()), "a product");
    return;
  }
  const auto algorithm =
      AlgorithmFor({shape, AlignOf(a), AlignOf(b), AlignOf(c)});
  Problem p;
  absl::Status status =
      algorithm.ok() ? Describe(shape, &p) : algorithm.status();
  if (!status.ok()) {
    stream.Fail(std::move(status));
    return;
  }
  const float beta = shape.accumulate ? 1 : 0;
  auto issue = [=, this, chosen = *algorithm](cudaStream_t to) mutable {
    const float one = 1;
    return CublasStatus(cublasLtMatmul(handle_, &p.product, &one, b, &p.b, a,
                                       &p.a, &beta, c, &p.c, c, &p.c, &chosen,
                                       workspace_, kGemmWorkspaceBytes, to),
                        "a product");
  };
  if (LaunchRecord* const record = LaunchRecord::Of(stream.get())) {
    // The operands' layouts and the product come of the shape.
    record->Add(issue, LaunchRecord::kProduct, shape, a, b, c, *algorithm,
                workspace_);
  } else {
    stream.Fail(issue(stream.get()));
  }
}

std::string CudaGemm::TakeNewAlgorithms() {
  if (new_.empty()) return "";
  return PackAlgorithms(std::exchange(new_, {}), device_);
}

absl::Status CudaGemm::AdoptAlgorithms(std::string_view blob) {
  GW_ASSIGN_OR_RETURN(GemmAlgorithms algorithms,
                      UnpackAlgorithms(blob, device_));
  for (const auto& [key, algorithm] : algorithms) {
    if (!Takes(key.shape, algorithm)) {
      return absl::DataLossError(
          "cuBLASLt does not take the algorithm of a product of " +
          std::to_string(key.shape.m) + " x " + std::to_string(key.shape.n) +
          " x " + std::to_string(key.shape.k));
    }
  }
  algorithms_.merge(algorithms);
  return absl::OkStatus();
}

}  // namespace gradwire
