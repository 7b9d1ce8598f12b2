// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/tensor_hash.h"

// On x86 the packaged library has its vector code behind these names only.
#if defined(__x86_64__)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/check.h"
#include "base/crc32c.h"
#include "checkpoint/delta/chunk_table.h"

namespace gradwire {
namespace {

Hash128 Canonical(XXH128_hash_t hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  Hash128 out;
  std::copy_n(canonical.digest, 16, out.bytes.begin());
  return out;
}

void AppendNumber(std::string& out, int64_t value) {
  for (int i = 0; i < 8; ++i) {
    out.push_back(static_cast<char>(value >> (8 * i)));
  }
}

void AppendText(std::string& out, const std::string& text) {
  AppendNumber(out, static_cast<int64_t>(text.size()));
  out += text;
}

}  // namespace

std::string Hash128::Hex() const {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const uint8_t byte : bytes) {
    hex.push_back(kDigits[byte >> 4]);
    hex.push_back(kDigits[byte & 15]);
  }
  return hex;
}

std::optional<Hash128> Hash128::FromHex(const std::string& hex) {
  if (hex.size() != 32) return std::nullopt;
  Hash128 hash;
  for (size_t i = 0; i < 32; ++i) {
    const char c = hex[i];
    const bool digit = c >= '0' && c <= '9';
    if (!digit && !(c >= 'a' && c <= 'f')) return std::nullopt;
    const int value = digit ? c - '0' : c - 'a' + 10;
    hash.bytes[i / 2] = static_cast<uint8_t>(hash.bytes[i / 2] << 4 | value);
  }
  return hash;
}

int64_t TensorInfo::num_elements() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1},
                         std::multiplies<>());
}

int64_t DeltaElementBytes(const std::string& dtype) {
  if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (IsFloat16(dtype) || dtype == "I16" || dtype == "U16") return 2;
  if (dtype == "I8" || dtype == "U8" || dtype == "BOOL" || dtype == "F8_E4M3" ||
      dtype == "F8_E5M2") {
    return 1;
  }
  return 0;
}

bool IsFloat16(const std::string& dtype) {
  return dtype == "BF16" || dtype == "F16";
}

Hash128 HashBytes128(const void* data, int64_t bytes) {
  return Canonical(XXH3_128bits(data, static_cast<size_t>(bytes)));
}

uint64_t HashBytes64(const void* data, int64_t bytes) {
  return XXH3_64bits(data, static_cast<size_t>(bytes));
}

Checksums::Checksums() : state_(XXH3_createState()) {
  GW_CHECK(state_ != nullptr);
  Reset();
}

Checksums::~Checksums() { XXH3_freeState(state_); }

void Checksums::Reset() {
  XXH3_128bits_reset(state_);
  crc_ = 0;
}

void Checksums::Add(const void* data, int64_t bytes) {
  // In this order: memory's prefetching follows the first reader, and only this
  // one reads evenly.
  crc_ = Crc32c(data, bytes, crc_);
  XXH3_128bits_update(state_, data, static_cast<size_t>(bytes));
}

Hash128 Checksums::hash() const {
  return Canonical(XXH3_128bits_digest(state_));
}

Hash128 HashOfChunks(absl::Span<const Hash128> chunks) {
  return HashBytes128(chunks.data(), static_cast<int64_t>(chunks.size()) * 16);
}

void HashChunks(const void* data, int64_t num_elements, int64_t element_bytes,
                std::vector<Hash128>& out) {
  const auto* at = static_cast<const uint8_t*>(data);
  for (int64_t begin = 0; begin < num_elements; begin += kChunkElements) {
    const int64_t n = std::min(kChunkElements, num_elements - begin);
    out.push_back(HashBytes128(at, n * element_bytes));
    at += n * element_bytes;
  }
}

std::string WeightId(absl::Span<const TensorInfo> tensors,
                     absl::Span<const Hash128> hashes) {
  std::vector<size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return tensors[a].name < tensors[b].name;
  });
  std::string text;
  for (const size_t i : order) {
    AppendText(text, tensors[i].name);
    AppendText(text, tensors[i].dtype);
    AppendNumber(text, static_cast<int64_t>(tensors[i].shape.size()));
    for (const int64_t dim : tensors[i].shape) AppendNumber(text, dim);
    text.append(reinterpret_cast<const char*>(hashes[i].bytes.data()), 16);
  }
  return HashBytes128(text.data(), static_cast<int64_t>(text.size())).Hex();
}

}  // namespace gradwire
