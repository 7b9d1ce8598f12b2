// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/gemm_algorithms.h"

#include <bit>
#include <cstring>
#include <string>

#include "base/crc32c.h"

namespace gradwire {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::string_view kMagic = "GWGEMM01";

struct Entry {
  int64_t m, n, k, a_row, b_row, c_row;
  uint8_t a_transposed, b_transposed, accumulate;
  uint8_t ab, c;  // 1 for bf16, 0 for f32
  uint8_t a_align, b_align, c_align;
  cublasLtMatmulAlgo_t algorithm;
};
// Without padding, whose bytes would be anything.
static_assert(sizeof(Entry) == 6 * 8 + 8 + sizeof(cublasLtMatmulAlgo_t));

template <typename T>
void Append(std::string& blob, const T& value) {
  blob.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

template <typename T>
bool Take(std::string_view& blob, T& value) {
  if (blob.size() < sizeof(value)) return false;
  std::memcpy(&value, blob.data(), sizeof(value));
  blob.remove_prefix(sizeof(value));
  return true;
}
bool Take(std::string_view& blob, uint64_t bytes, std::string_view& value) {
  if (blob.size() < bytes) return false;
  value = blob.substr(0, bytes);
  blob.remove_prefix(bytes);
  return true;
}

uint8_t Code(DType dtype) { return dtype == DType::kBF16 ? 1 : 0; }
DType DTypeOfCode(uint8_t code) {
  return code == 1 ? DType::kBF16 : DType::kF32;
}

bool IsAlign(uint32_t align, DType dtype) {
  return std::has_single_bit(align) && align >= DTypeBytes(dtype) &&
         align <= kGemmMaxAlign;
}

// Whether a product can have this key.
bool IsKey(const CudaGemmKey& key) {
  const CudaGemmShape& s = key.shape;
  return s.m > 0 && s.n > 0 && s.k > 0 &&
         s.a_row >= (s.a_transposed ? s.m : s.k) &&
         s.b_row >= (s.b_transposed ? s.k : s.n) && s.c_row >= s.n &&
         (s.c == DType::kF32 || s.ab == DType::kBF16) &&
         IsAlign(key.a_align, s.ab) && IsAlign(key.b_align, s.ab) &&
         IsAlign(key.c_align, s.c);
}

absl::Status Damaged(const std::string& what) {
  return absl::DataLossError("the list of cuBLASLt's algorithms is damaged: " +
                             what);
}

}  // namespace

CudaGemmShape RoundedShape(CudaGemmShape shape) {
  const auto round = [](int64_t n) {
    if (n <= 16) return n;
    // Between 2^(w-1) and 2^w, w the bits of n - 1, are eight steps.
    const int64_t step = int64_t{1}
                         << (std::bit_width(static_cast<uint64_t>(n - 1)) - 4);
    return (n + step - 1) / step * step;
  };
  if (!shape.a_transposed) {
    shape.m = round(shape.m);
  } else if (!shape.b_transposed) {
    shape.k = round(shape.k);
  }
  return shape;
}

std::string PackAlgorithms(const GemmAlgorithms& algorithms,
                           std::string_view device) {
  std::string blob(kMagic);
  Append(blob, uint64_t{cublasLtGetVersion()});
  Append(blob, static_cast<uint32_t>(device.size()));
  blob += device;
  Append(blob, uint64_t{algorithms.size()});
  for (const auto& [key, algorithm] : algorithms) {
    const CudaGemmShape& s = key.shape;
    Append(blob, Entry{s.m, s.n, s.k, s.a_row, s.b_row, s.c_row, s.a_transposed,
                       s.b_transposed, s.accumulate, Code(s.ab), Code(s.c),
                       static_cast<uint8_t>(key.a_align),
                       static_cast<uint8_t>(key.b_align),
                       static_cast<uint8_t>(key.c_align), algorithm});
  }
  Append(blob, Crc32c(blob.data(), static_cast<int64_t>(blob.size())));
  return blob;
}

absl::StatusOr<GemmAlgorithms> UnpackAlgorithms(std::string_view blob,
                                                std::string_view device) {
  uint32_t crc = 0;
  if (blob.size() < kMagic.size() + sizeof(crc)) return Damaged("it is short");
  const std::string_view content = blob.substr(0, blob.size() - sizeof(crc));
  std::memcpy(&crc, blob.data() + content.size(), sizeof(crc));
  if (crc != Crc32c(content.data(), static_cast<int64_t>(content.size()))) {
    return Damaged("its checksum differs");
  }
  std::string_view rest = content, magic, name;
  uint64_t version = 0, count = 0;
  uint32_t name_bytes = 0;
  if (!Take(rest, kMagic.size(), magic) || magic != kMagic ||
      !Take(rest, version) || !Take(rest, name_bytes) ||
      !Take(rest, name_bytes, name) || !Take(rest, count)) {
    return Damaged("its head is not that of such a list");
  }
  // Before the entries, whose bytes only their own version understands.
  if (version != cublasLtGetVersion()) {
    return absl::FailedPreconditionError(
        "the algorithms are of cuBLASLt " + std::to_string(version) +
        ", this is " + std::to_string(cublasLtGetVersion()));
  }
  if (name != device) {
    return absl::FailedPreconditionError("the algorithms are of " +
                                         std::string(name) + ", this is " +
                                         std::string(device));
  }
  if (rest.size() % sizeof(Entry) != 0 || rest.size() / sizeof(Entry) != count)
    return Damaged("it does not have the entries that it says");
  GemmAlgorithms algorithms;
  Entry e;
  while (Take(rest, e)) {
    const std::string number = std::to_string(algorithms.size());
    if (e.a_transposed > 1 || e.b_transposed > 1 || e.accumulate > 1 ||
        e.ab > 1 || e.c > 1) {
      return Damaged("entry " + number + " is of no product");
    }
    const CudaGemmKey key = {{.m = e.m,
                              .n = e.n,
                              .k = e.k,
                              .a_transposed = e.a_transposed == 1,
                              .b_transposed = e.b_transposed == 1,
                              .a_row = e.a_row,
                              .b_row = e.b_row,
                              .c_row = e.c_row,
                              .ab = DTypeOfCode(e.ab),
                              .c = DTypeOfCode(e.c),
                              .accumulate = e.accumulate == 1},
                             e.a_align,
                             e.b_align,
                             e.c_align};
    if (!IsKey(key)) return Damaged("entry " + number + " is of no product");
    if (!algorithms.empty() && !(algorithms.rbegin()->first < key)) {
      return Damaged("entry " + number + " is out of order");
    }
    algorithms.emplace_hint(algorithms.end(), key, e.algorithm);
  }
  return algorithms;
}

}  // namespace gradwire
