// SPDX-License-Identifier: Apache-2.0
// The names of weights by their content. docs/delta.md has the byte tables.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"

struct XXH3_state_s;

namespace gradwire {

// XXH3-128, canonical (big-endian) bytes.
struct Hash128 {
  std::array<uint8_t, 16> bytes = {};

  // 32 lower-case hexadecimal digits, and back.
  std::string Hex() const;
  static std::optional<Hash128> FromHex(const std::string& hex);
  bool operator==(const Hash128&) const = default;
};

// One tensor by name, without its values.
struct TensorInfo {
  std::string name;
  std::string dtype;  // of safetensors: "BF16", "F32", ...
  std::vector<int64_t> shape;

  // REQUIRES: the product does not overflow.
  int64_t num_elements() const;
  bool operator==(const TensorInfo&) const = default;
};

// Bytes of an element, 0 if the dtype is unknown; whether it is one of the
// 16-bit floats whose changes are subtracted.
int64_t DeltaElementBytes(const std::string& dtype);
bool IsFloat16(const std::string& dtype);

Hash128 HashBytes128(const void* data, int64_t bytes);
uint64_t HashBytes64(const void* data, int64_t bytes);

// CRC32C and XXH3-128 of bytes that come piece by piece.
// Thread rule: one thread each.
class Checksums {
 public:
  Checksums();
  Checksums(const Checksums&) = delete;
  Checksums& operator=(const Checksums&) = delete;
  ~Checksums();

  // Begins anew.
  void Reset();
  void Add(const void* data, int64_t bytes);
  uint32_t crc() const { return crc_; }
  Hash128 hash() const;

 private:
  XXH3_state_s* const state_;
  uint32_t crc_ = 0;
};

// The hash of a tensor is that of its chunks' hashes one after another, so that
// ranks can hash their shards alone.
Hash128 HashOfChunks(absl::Span<const Hash128> chunks);

// The hashes of the chunks of `num_elements` elements at `data`, appended.
void HashChunks(const void* data, int64_t num_elements, int64_t element_bytes,
                std::vector<Hash128>& out);

// The identity of a set of weights: of the names, dtypes, shapes and hashes of
// all its tensors, in any order.
std::string WeightId(absl::Span<const TensorInfo> tensors,
                     absl::Span<const Hash128> hashes);

}  // namespace gradwire
