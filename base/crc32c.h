// SPDX-License-Identifier: Apache-2.0
// CRC32C (Castagnoli), as in RFC 3720.
#pragma once

#include <cstdint>

namespace gradwire {

// Of the bytes that gave `crc` (none: 0) and then these.
uint32_t Crc32c(const void* data, int64_t bytes, uint32_t crc = 0);

}  // namespace gradwire
