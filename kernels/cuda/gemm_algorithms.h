// SPDX-License-Identifier: Apache-2.0
// Which of cuBLASLt's algorithms makes which product. They decide the bits of
// its result, so that whoever must get the same bits later stores them as a
// blob: for one version of cuBLASLt and one kind of GPU.
//
// The blob, little-endian: "GWGEMM01"; u64 version of cuBLASLt; u32 bytes of
// the device's name, and these; u64 number of entries; the entries, ascending
// by key; u32 CRC32C of all before it.
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "device/dtype.h"

namespace gradwire {

// c = a b (+ c): c [m, n], a [m, k] or stored transposed, [k, m], b [k, n] or
// stored transposed, [n, k], all of them row-major.
struct CudaGemmShape {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  bool a_transposed = false;
  bool b_transposed = false;
  // From one row to the next, as stored.
  int64_t a_row = 0;
  int64_t b_row = 0;
  int64_t c_row = 0;
  // f32 | bf16 of a and b; f32, or as these, of c.
  DType ab = DType::kF32;
  DType c = DType::kF32;
  bool accumulate = false;

  auto operator<=>(const CudaGemmShape&) const = default;
};

// What an algorithm is chosen for: bytes that the addresses are multiples of.
struct CudaGemmKey {
  CudaGemmShape shape;
  uint32_t a_align = 0;
  uint32_t b_align = 0;
  uint32_t c_align = 0;

  auto operator<=>(const CudaGemmKey&) const = default;
};

// More is asked of an address by no kernel of cuBLASLt, and the less it is
// distinguished the less depends on where an allocator puts a tensor.
inline constexpr uint32_t kGemmMaxAlign = 16;

// The shape whose algorithm is that of `shape`, too: the number of tokens is
// rounded up to the next of eight steps in each octave, and is itself up to 16.
// It is what no row's length depends on: m, where a is stored as it is; k,
// where a alone is stored transposed.
CudaGemmShape RoundedShape(CudaGemmShape shape);

using GemmAlgorithms = std::map<CudaGemmKey, cublasLtMatmulAlgo_t>;

std::string PackAlgorithms(const GemmAlgorithms& algorithms,
                           std::string_view device);
// Errors: DATA_LOSS: not a whole blob; FAILED_PRECONDITION: of another version
// of cuBLASLt, or another device.
absl::StatusOr<GemmAlgorithms> UnpackAlgorithms(std::string_view blob,
                                                std::string_view device);

}  // namespace gradwire
