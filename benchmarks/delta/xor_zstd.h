// SPDX-License-Identifier: Apache-2.0
// The baseline: XOR of the old and new bytes, zstd level 1, no checksums.
#pragma once

#include <cstdint>
#include <vector>

struct ZSTD_CCtx_s;
struct ZSTD_DCtx_s;

namespace gradwire {

// Buffers are kept between calls.
class XorZstd {
 public:
  XorZstd();
  XorZstd(const XorZstd&) = delete;
  XorZstd& operator=(const XorZstd&) = delete;
  ~XorZstd();

  // Returns the encoded bytes; they stay until the next call.
  int64_t Encode(const std::vector<uint16_t>& before,
                 const std::vector<uint16_t>& after);
  // Applies what was encoded last, in place.
  void Apply(std::vector<uint16_t>& weights);

 private:
  ZSTD_CCtx_s* const compress_;
  ZSTD_DCtx_s* const decompress_;
  std::vector<uint16_t> difference_;
  std::vector<char> encoded_;
  int64_t encoded_bytes_ = 0;
};

}  // namespace gradwire
