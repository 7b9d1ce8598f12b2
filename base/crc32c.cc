// SPDX-License-Identifier: Apache-2.0
#include "base/crc32c.h"

#include <isa-l/crc.h>

#include <algorithm>

namespace gradwire {

uint32_t Crc32c(const void* data, int64_t bytes, uint32_t crc) {
  // The library counts in int, takes no const, and leaves the inversion to us.
  constexpr int64_t kMost = int64_t{1} << 30;
  unsigned char* next =
      const_cast<unsigned char*>(static_cast<const unsigned char*>(data));
  crc = ~crc;
  while (bytes > 0) {
    const int64_t part = std::min(bytes, kMost);
    crc = crc32_iscsi(next, static_cast<int>(part), crc);
    next += part;
    bytes -= part;
  }
  return ~crc;
}

}  // namespace gradwire
