// SPDX-License-Identifier: Apache-2.0
// The calls of cuBLASLt that gradwire makes, on the host. As there, an
// algorithm is for the types, layouts, alignment and workspace that it was
// chosen with, and for most sizes; a product that does not fit it, or that a
// GPU could not read, is refused. Sums are in float32, in an order that the
// algorithm decides.
#include <cublasLt.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "device/dtype.h"
#include "tests/cuda_emulator/block.h"
#include "tests/cuda_emulator/cublas_faults.h"
#include "tests/cuda_emulator/streams.h"

namespace {

using gradwire::BFloat16;
using gradwire::cuda_emulator::IsDeviceMemory;

std::atomic<int64_t> num_heuristics{0};
std::atomic<cublasStatus_t> next_failure{CUBLAS_STATUS_SUCCESS};
std::atomic<bool> bound_to_sizes{false};

uint64_t PartsOfEnvironment() {
  const char* parts = std::getenv("GRADWIRE_EMULATED_GEMM_PARTS");
  return parts != nullptr && std::strcmp(parts, "2") == 0 ? 2 : 1;
}
std::atomic<uint64_t> chosen_parts{PartsOfEnvironment()};

// What lies in the opaque structures.
struct Layout {
  uint64_t type, rows, cols;
  int64_t ld;
};
struct Desc {
  uint64_t compute, scale;
  int32_t trans_a, trans_b;
};
struct Preference {
  uint64_t workspace;
  uint32_t reduction;
  uint32_t align[4];  // a, b, c, d
};
struct Algo {
  uint64_t magic, problem, sizes, workspace;
  uint32_t align[4];
  uint64_t parts;  // of the inner dimension, each summed on its own
};
constexpr uint64_t kMagic = 0x6d65746c61677231;

template <typename Of, typename Opaque>
Of Read(const Opaque* opaque) {
  static_assert(sizeof(Of) <= sizeof(Opaque));
  Of value;
  std::memcpy(&value, opaque, sizeof(value));
  return value;
}
template <typename Of, typename Opaque>
void Write(Opaque* opaque, const Of& value) {
  static_assert(sizeof(Of) <= sizeof(Opaque));
  std::memset(opaque, 0, sizeof(*opaque));
  std::memcpy(opaque, &value, sizeof(value));
}

// c [m, n] = op(a) op(b), all by columns.
struct Problem {
  Desc desc;
  Layout a, b, c, d;
  int64_t m, n, k;
};

int64_t BytesOf(uint64_t type) { return type == CUDA_R_16BF ? 2 : 4; }

bool IsWhole(const Layout& l) {
  return (l.type == CUDA_R_16BF || l.type == CUDA_R_32F) && l.rows > 0 &&
         l.cols > 0 && l.ld >= static_cast<int64_t>(l.rows);
}

cublasStatus_t Understand(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                          cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                          cublasLtMatrixLayout_t d, Problem* problem) {
  Problem& p = *problem;
  p = {Read<Desc>(desc),
       Read<Layout>(a),
       Read<Layout>(b),
       Read<Layout>(c),
       Read<Layout>(d),
       0,
       0,
       0};
  for (const Layout& l : {p.a, p.b, p.c, p.d}) {
    if (!IsWhole(l)) return CUBLAS_STATUS_INVALID_VALUE;
  }
  const bool ta = p.desc.trans_a == CUBLAS_OP_T;
  const bool tb = p.desc.trans_b == CUBLAS_OP_T;
  p.m = static_cast<int64_t>(ta ? p.a.cols : p.a.rows);
  p.k = static_cast<int64_t>(ta ? p.a.rows : p.a.cols);
  p.n = static_cast<int64_t>(tb ? p.b.rows : p.b.cols);
  if (static_cast<int64_t>(tb ? p.b.cols : p.b.rows) != p.k ||
      static_cast<int64_t>(p.d.rows) != p.m ||
      static_cast<int64_t>(p.d.cols) != p.n || p.c.rows != p.d.rows ||
      p.c.cols != p.d.cols) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (p.a.type != p.b.type || p.c.type != p.d.type ||
      (p.a.type == CUDA_R_32F && p.d.type != CUDA_R_32F) ||
      p.desc.compute != CUBLAS_COMPUTE_32F || p.desc.scale != CUDA_R_32F) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  return CUBLAS_STATUS_SUCCESS;
}

// FNV-1a.
uint64_t HashOf(std::initializer_list<int64_t> words) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const int64_t word : words) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x100000001b3;
  }
  return hash;
}
uint64_t HashOfProblem(const Problem& p) {
  return HashOf({p.a.ld, p.b.ld, p.c.ld, p.d.ld, p.desc.trans_a, p.desc.trans_b,
                 static_cast<int64_t>(p.a.type),
                 static_cast<int64_t>(p.d.type)});
}
uint64_t HashOfSizes(const Problem& p) { return HashOf({p.m, p.n, p.k}); }

cublasStatus_t Suits(const Algo& algo, const Problem& p) {
  if (algo.magic != kMagic) return CUBLAS_STATUS_INVALID_VALUE;
  if (algo.problem != HashOfProblem(p) || algo.parts < 1 || algo.parts > 2 ||
      (bound_to_sizes && algo.sizes != HashOfSizes(p))) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  return CUBLAS_STATUS_SUCCESS;
}

// Whether the whole matrix lies in memory of the device, aligned as promised.
bool IsReadable(const void* data, const Layout& l, uint32_t align) {
  const int64_t elements =
      l.ld * (static_cast<int64_t>(l.cols) - 1) + static_cast<int64_t>(l.rows);
  return data != nullptr && reinterpret_cast<uintptr_t>(data) % align == 0 &&
         IsDeviceMemory(data) &&
         IsDeviceMemory(static_cast<const char*>(data) +
                        elements * BytesOf(l.type));
}

float Load(const void* data, uint64_t type, int64_t at) {
  return type == CUDA_R_16BF
             ? static_cast<float>(static_cast<const BFloat16*>(data)[at])
             : static_cast<const float*>(data)[at];
}

// Of a matrix by columns: its transposed if asked for, as dense rows of
// float32.
std::vector<float> Unpack(const void* data, const Layout& l, bool by_columns) {
  const auto rows = static_cast<int64_t>(l.rows);
  const auto cols = static_cast<int64_t>(l.cols);
  std::vector<float> dense(static_cast<size_t>(rows * cols));
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      dense[static_cast<size_t>(by_columns ? c * rows + r : r * cols + c)] =
          Load(data, l.type, c * l.ld + r);
    }
  }
  return dense;
}

struct Operands {
  const void* a;
  const void* b;
  const void* c;
  void* d;
  float alpha, beta;
};

// Column j of d is a sum of columns of op(a), which follow each other.
void Multiply(const Problem& p, int64_t parts, const Operands& o) {
  const std::vector<float> a =
      Unpack(o.a, p.a, p.desc.trans_a != CUBLAS_OP_T);  // [k, m]
  const std::vector<float> b =
      Unpack(o.b, p.b, p.desc.trans_b != CUBLAS_OP_T);  // [n, k]
  std::vector<float> sum(static_cast<size_t>(p.m)), part(sum.size());
  for (int64_t j = 0; j < p.n; ++j) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t s = 0; s < parts; ++s) {
      std::fill(part.begin(), part.end(), 0.0f);
      for (int64_t l = s * p.k / parts; l < (s + 1) * p.k / parts; ++l) {
        const float factor = b[static_cast<size_t>(j * p.k + l)];
        const float* column = a.data() + l * p.m;
        for (int64_t i = 0; i < p.m; ++i) {
          part[static_cast<size_t>(i)] += column[i] * factor;
        }
      }
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
    }
    for (int64_t i = 0; i < p.m; ++i) {
      float value = o.alpha * sum[static_cast<size_t>(i)];
      // What is not added to is not read.
      if (o.beta != 0) value += o.beta * Load(o.c, p.c.type, j * p.c.ld + i);
      if (p.d.type == CUDA_R_16BF) {
        static_cast<BFloat16*>(o.d)[j * p.d.ld + i] = BFloat16(value);
      } else {
        static_cast<float*>(o.d)[j * p.d.ld + i] = value;
      }
    }
  }
}

}  // namespace

struct cublasLtContext {};

namespace gradwire::cuda_emulator {

int64_t NumHeuristics() { return num_heuristics; }
void FailNextMatmul(cublasStatus_t status) { next_failure = status; }
void BindToSizes(bool bind) { bound_to_sizes = bind; }
void ChooseParts(int parts) { chosen_parts = static_cast<uint64_t>(parts); }

}  // namespace gradwire::cuda_emulator

extern "C" {

size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

const char* cublasLtGetStatusName(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "CUBLAS_STATUS_SUCCESS"
                                         : "CUBLAS_STATUS_OF_THE_EMULATOR";
}
const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "no error"
                                         : "the emulator refused the product";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout,
                                                 size_t, cudaDataType type,
                                                 uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
  Write(layout, Layout{static_cast<uint64_t>(type), rows, cols, ld});
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t desc,
                                               size_t,
                                               cublasComputeType_t compute,
                                               cudaDataType_t scale) {
  Write(desc, Desc{static_cast<uint64_t>(compute), static_cast<uint64_t>(scale),
                   CUBLAS_OP_N, CUBLAS_OP_N});
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t opaque, cublasLtMatmulDescAttributes_t attribute,
    const void* value, size_t bytes) {
  if (bytes != sizeof(int32_t)) return CUBLAS_STATUS_INVALID_VALUE;
  Desc desc = Read<Desc>(opaque);
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      std::memcpy(&desc.trans_a, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_TRANSB:
      std::memcpy(&desc.trans_b, value, bytes);
      break;
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  Write(opaque, desc);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(
    cublasLtMatmulPreference_t preference, size_t) {
  Write(preference,
        Preference{0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}});
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t opaque,
    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
    size_t bytes) {
  Preference preference = Read<Preference>(opaque);
  uint32_t* word = nullptr;
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      if (bytes != 8) return CUBLAS_STATUS_INVALID_VALUE;
      std::memcpy(&preference.workspace, value, bytes);
      Write(opaque, preference);
      return CUBLAS_STATUS_SUCCESS;
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
      word = &preference.reduction;
      break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
      word = &preference.align[0];
      break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
      word = &preference.align[1];
      break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
      word = &preference.align[2];
      break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
      word = &preference.align[3];
      break;
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (bytes != 4) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(word, value, bytes);
  Write(opaque, preference);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
    cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t opaque, int,
    cublasLtMatmulHeuristicResult_t results[], int* count) {
  *count = 0;
  Problem p;
  const cublasStatus_t status = Understand(desc, a, b, c, d, &p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  ++num_heuristics;
  const auto preference = Read<Preference>(opaque);
  // Rounding partial sums of bf16 is beyond what a product promises.
  if ((preference.reduction & CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE) != 0) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  Algo algo = {kMagic, HashOfProblem(p), HashOfSizes(p), preference.workspace,
               {},     chosen_parts};
  std::copy_n(preference.align, 4, algo.align);
  results[0] = {};
  Write(&results[0].algo, algo);
  results[0].workspaceSize = algo.workspace;
  results[0].state = CUBLAS_STATUS_SUCCESS;
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(
    cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
    cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* opaque,
    cublasLtMatmulHeuristicResult_t* result) {
  Problem p;
  cublasStatus_t status = Understand(desc, a, b, c, d, &p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const auto algo = Read<Algo>(opaque);
  status = Suits(algo, p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  result->workspaceSize = algo.workspace;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                              const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta,
                              const void* c, cublasLtMatrixLayout_t c_layout,
                              void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* opaque,
                              void* workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
  cublasStatus_t status = next_failure.exchange(CUBLAS_STATUS_SUCCESS);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  Problem p;
  status = Understand(desc, a_layout, b_layout, c_layout, d_layout, &p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const auto algo = Read<Algo>(opaque);
  status = Suits(algo, p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  if (!IsReadable(a, p.a, algo.align[0]) ||
      !IsReadable(b, p.b, algo.align[1]) ||
      !IsReadable(c, p.c, algo.align[2]) ||
      !IsReadable(d, p.d, algo.align[3]) || workspace_bytes < algo.workspace ||
      (algo.workspace > 0 &&
       (reinterpret_cast<uintptr_t>(workspace) % 16 != 0 ||
        !IsDeviceMemory(workspace) ||
        !IsDeviceMemory(static_cast<char*>(workspace) + algo.workspace)))) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const Operands operands = {a,
                             b,
                             c,
                             d,
                             *static_cast<const float*>(alpha),
                             *static_cast<const float*>(beta)};
  const auto parts = static_cast<int64_t>(algo.parts);
  // Enough of the workspace to spoil what an op keeps there, if it does.
  constexpr size_t kSpoiled = size_t{1} << 16;
  gradwire::cuda_emulator::StreamOf(stream).Add([=] {
    std::memset(workspace, 0xff, std::min(algo.workspace, kSpoiled));
    if (algo.workspace > kSpoiled) {
      std::memset(static_cast<char*>(workspace) + algo.workspace - kSpoiled,
                  0xff, kSpoiled);
    }
    Multiply(p, parts, operands);
  });
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
