// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/delta/xor_zstd.h"

#include <zstd.h>

#include "base/check.h"

namespace gradwire {

XorZstd::XorZstd()
    : compress_(ZSTD_createCCtx()), decompress_(ZSTD_createDCtx()) {}

XorZstd::~XorZstd() {
  ZSTD_freeCCtx(compress_);
  ZSTD_freeDCtx(decompress_);
}

int64_t XorZstd::Encode(const std::vector<uint16_t>& before,
                        const std::vector<uint16_t>& after) {
  difference_.resize(before.size());
  encoded_.resize(ZSTD_compressBound(before.size() * 2));
  for (size_t i = 0; i < before.size(); ++i) {
    difference_[i] = before[i] ^ after[i];
  }
  const size_t bytes =
      ZSTD_compressCCtx(compress_, encoded_.data(), encoded_.size(),
                        difference_.data(), before.size() * 2, 1);
  GW_CHECK(!ZSTD_isError(bytes));
  encoded_bytes_ = static_cast<int64_t>(bytes);
  return encoded_bytes_;
}

void XorZstd::Apply(std::vector<uint16_t>& weights) {
  const size_t bytes = ZSTD_decompressDCtx(
      decompress_, difference_.data(), difference_.size() * 2, encoded_.data(),
      static_cast<size_t>(encoded_bytes_));
  GW_CHECK(bytes == weights.size() * 2);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] ^= difference_[i];
}

}  // namespace gradwire
