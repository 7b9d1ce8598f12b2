// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/chunk_table.h"

#include <algorithm>

namespace gradwire {
namespace {

// Whether `row` can stand for a chunk of `size` elements.
bool IsPossible(const ChunkRow& row, int64_t size) {
  if (row.flags > kFlagFast || row.changed > size) return false;
  const bool values =
      row.method == ChunkMethod::kGaps || row.method == ChunkMethod::kBitmap;
  if (row.escapes > (values ? row.changed : 0)) return false;
  if (row.gap_extensions >
      (row.method == ChunkMethod::kGaps ? size / 255 : 0)) {
    return false;
  }
  return row.method != ChunkMethod::kRaw || row.changed == size;
}

}  // namespace

void WriteChunkTable(const std::vector<ChunkRow>& rows, ByteBuffer& out) {
  const int64_t n = static_cast<int64_t>(rows.size());
  uint8_t* planes = out.Room(n * kChunkRowBytes);
  auto put = [&](int64_t chunk, int plane, int bytes, uint32_t value) {
    for (int b = 0; b < bytes; ++b) {
      planes[(plane + b) * n + chunk] = static_cast<uint8_t>(value >> (8 * b));
    }
  };
  for (int64_t c = 0; c < n; ++c) {
    const ChunkRow& row = rows[static_cast<size_t>(c)];
    put(c, 0, 1, static_cast<uint32_t>(row.method));
    put(c, 1, 1, row.flags);
    put(c, 2, 2, static_cast<uint32_t>(std::max(row.changed - 1, 0)));
    put(c, 4, 2, static_cast<uint32_t>(row.gap_extensions));
    put(c, 6, 2, static_cast<uint32_t>(row.escapes));
    put(c, 8, 4, row.crc);
  }
  out.Add(n * kChunkRowBytes);
}

bool ReadChunkTable(const uint8_t* planes, int64_t num_elements,
                    std::vector<ChunkRow>& rows) {
  const int64_t n = NumChunks(num_elements);
  rows.resize(static_cast<size_t>(n));
  auto get = [&](int64_t chunk, int plane, int bytes) {
    uint32_t value = 0;
    for (int b = bytes - 1; b >= 0; --b) {
      value = value << 8 | planes[(plane + b) * n + chunk];
    }
    return value;
  };
  for (int64_t c = 0; c < n; ++c) {
    ChunkRow& row = rows[static_cast<size_t>(c)];
    const uint32_t method = get(c, 0, 1);
    if (method > static_cast<uint32_t>(ChunkMethod::kRaw)) return false;
    row.method = static_cast<ChunkMethod>(method);
    row.flags = static_cast<uint8_t>(get(c, 1, 1));
    row.changed = static_cast<int32_t>(get(c, 2, 2)) + 1;
    if (row.method == ChunkMethod::kUnchanged) {
      if (row.changed != 1) return false;
      row.changed = 0;
    }
    row.gap_extensions = static_cast<int32_t>(get(c, 4, 2));
    row.escapes = static_cast<int32_t>(get(c, 6, 2));
    row.crc = get(c, 8, 4);
    const int64_t begin = c * kChunkElements;
    if (!IsPossible(row, std::min(kChunkElements, num_elements - begin))) {
      return false;
    }
  }
  return true;
}

}  // namespace gradwire
