// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "base/crc32c.h"
#include "checkpoint/delta/group.h"
#include "checkpoint/delta/scan.h"

namespace gradwire {

bool GroupDecoder::Unpack(const GroupShape& shape,
                          absl::Span<const ChunkRow> rows,
                          const DeltaGroup& group, const uint8_t* stored,
                          Cursor& cursor) {
  const auto room = static_cast<size_t>(shape.chunk_size(0) + kPatchSlack);
  if (differences_.size() < room) differences_.resize(room);
  const std::array<int64_t, kMaxStreams> bytes = StreamBytes(shape, rows);
  for (size_t s = 0; s < group.sizes.size(); ++s) {
    streams_[s].Clear();
    cursor[s] = nullptr;
    if ((group.sizes[s] == 0) != (bytes[s] == 0)) return false;
    if (bytes[s] == 0) continue;
    cursor[s] = unpacker_.Unpack(stored, group.sizes[s], bytes[s], streams_[s]);
    if (cursor[s] == nullptr) return false;
    stored += group.sizes[s];
  }
  return true;
}

bool GroupDecoder::PatchChunk(const ChunkRow& row, int64_t n,
                              Direction direction, Cursor& cursor,
                              uint16_t* weights, uint32_t& crc) {
  const int64_t changed = row.changed;
  if (row.method == ChunkMethod::kDense) {
    PatchDense(cursor[kLowStream], cursor[kHighStream], direction, weights, n);
    cursor[kLowStream] += n;
    cursor[kHighStream] += n;
  } else {
    if (!ReadValues(cursor[kValueStream], changed, cursor[kEscapeStream],
                    row.escapes, direction, differences_.data())) {
      return false;
    }
    cursor[kValueStream] += changed;
    if (row.escapes > 0) cursor[kEscapeStream] += 2 * row.escapes;
  }
  if (row.method == ChunkMethod::kGaps) {
    const int64_t bytes = changed + row.gap_extensions;
    const uint8_t* gaps = cursor[kGapStream];
    cursor[kGapStream] += bytes;
    return PatchGaps(gaps, bytes, differences_.data(), changed, weights, n,
                     crc);
  }
  if (row.method == ChunkMethod::kBitmap) {
    const uint8_t* bitmap = cursor[kBitmapStream];
    cursor[kBitmapStream] += (n + 7) / 8;
    if (!PatchBitmap(bitmap, differences_.data(), changed, weights, n)) {
      return false;
    }
  }
  crc = Crc32c(weights, 2 * n);
  return true;
}

bool GroupDecoder::PutRaw(const ChunkRow& row, int64_t n, int64_t element_bytes,
                          const Options& options, Cursor& cursor,
                          uint8_t* weights) {
  const int64_t bytes = n * element_bytes;
  scratch_.resize(static_cast<size_t>(bytes));
  for (int64_t p = 0; p < element_bytes; ++p) {
    const uint8_t*& plane = cursor[static_cast<size_t>(kPlaneStream + p)];
    PutPlane(plane, n, element_bytes, p, scratch_.data());
    plane += n;
  }
  if (options.check && Crc32c(scratch_.data(), bytes) != row.crc) return false;
  if (options.saved != nullptr) options.saved->Append(weights, bytes);
  std::memcpy(weights, scratch_.data(), static_cast<size_t>(bytes));
  return true;
}

void GroupDecoder::UndoChunks(const GroupShape& shape,
                              absl::Span<const ChunkRow> rows, Cursor cursor,
                              const uint8_t* saved, uint8_t* weights) {
  for (size_t c = 0; c < rows.size(); ++c) {
    const int64_t n = shape.chunk_size(static_cast<int64_t>(c));
    const int64_t bytes = n * shape.element_bytes;
    if (rows[c].method == ChunkMethod::kRaw) {
      if (saved != nullptr) {
        std::memcpy(weights, saved, static_cast<size_t>(bytes));
        saved += bytes;
      }
    } else if (rows[c].method != ChunkMethod::kUnchanged) {
      uint32_t crc;
      PatchChunk(rows[c], n, Direction::kUndo, cursor,
                 reinterpret_cast<uint16_t*>(weights), crc);
    }
    weights += bytes;
  }
}

GroupResult GroupDecoder::Decode(const GroupShape& shape,
                                 absl::Span<const ChunkRow> rows,
                                 const DeltaGroup& group, const uint8_t* stored,
                                 Options options, void* weights) {
  Cursor cursor = {};
  if (!Unpack(shape, rows, group, stored, cursor)) return GroupResult::kCorrupt;
  const Cursor begin = cursor;
  const int64_t saved_begin =
      options.saved == nullptr ? 0 : options.saved->size();
  auto* bytes_of_group = static_cast<uint8_t*>(weights);
  auto* at = bytes_of_group;
  auto fail = [&](size_t num_chunks, GroupResult why) {
    UndoChunks(shape, rows.subspan(0, num_chunks), begin,
               options.saved == nullptr ? nullptr
                                        : options.saved->data() + saved_begin,
               bytes_of_group);
    return why;
  };
  for (size_t c = 0; c < rows.size(); ++c) {
    const ChunkRow& row = rows[c];
    const int64_t n = shape.chunk_size(static_cast<int64_t>(c));
    const int64_t bytes = n * shape.element_bytes;
    if (row.method == ChunkMethod::kRaw) {
      if (!PutRaw(row, n, shape.element_bytes, options, cursor, at)) {
        return fail(c, GroupResult::kMismatch);
      }
    } else {
      uint32_t crc = 0;
      if (row.method == ChunkMethod::kUnchanged) {
        if (options.check) crc = Crc32c(at, bytes);
      } else if (!PatchChunk(row, n, Direction::kApply, cursor,
                             reinterpret_cast<uint16_t*>(at), crc)) {
        return fail(c, GroupResult::kCorrupt);
      }
      if (options.check && crc != row.crc) {
        return fail(c + 1, GroupResult::kMismatch);
      }
    }
    at += bytes;
  }
  return GroupResult::kOk;
}

void GroupDecoder::Undo(const GroupShape& shape,
                        absl::Span<const ChunkRow> rows,
                        const DeltaGroup& group, const uint8_t* stored,
                        const uint8_t* saved, void* weights) {
  Cursor cursor = {};
  if (!Unpack(shape, rows, group, stored, cursor)) return;
  UndoChunks(shape, rows, cursor, saved, static_cast<uint8_t*>(weights));
}

}  // namespace gradwire
