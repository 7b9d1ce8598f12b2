// SPDX-License-Identifier: Apache-2.0
// What a delta says about each chunk of a tensor: 12 bytes, so that any chunk
// is found without reading the others. docs/delta.md has the byte table.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoint/delta/byte_buffer.h"

namespace gradwire {

inline constexpr int64_t kChunkElements = 65536;
inline constexpr int64_t kGroupChunks = 128;
inline constexpr int64_t kChunkRowBytes = 12;

enum class ChunkMethod : uint8_t {
  kUnchanged = 0,
  kGaps = 1,
  kBitmap = 2,
  kDense = 3,
  kRaw = 4,
};

// The chunk's streams were not offered to zstd.
inline constexpr uint8_t kFlagFast = 1;

struct ChunkRow {
  ChunkMethod method = ChunkMethod::kUnchanged;
  uint8_t flags = 0;
  // Elements that changed; with kRaw all of them. 0 for kUnchanged only.
  int32_t changed = 0;
  int32_t gap_extensions = 0;  // bytes 255 among the gaps
  int32_t escapes = 0;         // values that take two bytes more
  uint32_t crc = 0;            // CRC32C of the chunk's new bytes

  bool operator==(const ChunkRow&) const = default;
};

constexpr int64_t NumChunks(int64_t num_elements) {
  return (num_elements + kChunkElements - 1) / kChunkElements;
}

// Appends the rows as 12 byte planes.
void WriteChunkTable(const std::vector<ChunkRow>& rows, ByteBuffer& out);

// Reads 12 * num_chunks bytes. False if a row cannot be: an unknown method or
// flag, more changes than elements, counts that its method does not have.
bool ReadChunkTable(const uint8_t* planes, int64_t num_elements,
                    std::vector<ChunkRow>& rows);

}  // namespace gradwire
