// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <numeric>

#include "checkpoint/delta/group.h"
#include "checkpoint/delta/scan.h"
#include "checkpoint/delta/tensor_hash.h"

namespace gradwire {
namespace {

// Where the bytes that say which elements changed are fewest: gaps below, a
// bitmap between, a value for every element above.
constexpr double kBitmapDensity = 0.15;
constexpr double kDenseDensity = 0.6;

// Below, changes are looked up one by one.
constexpr double kFewDensity = 0.04;

// Elements that are scanned and summed in turns, so that memory delivers the
// next ones while sums are taken. Much smaller and the sums' overhead shows.
constexpr int64_t kBlock = 1024;

}  // namespace

int64_t DeltaGroup::stored_bytes() const {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
}

std::array<int64_t, kMaxStreams> StreamBytes(const GroupShape& shape,
                                             absl::Span<const ChunkRow> rows) {
  std::array<int64_t, kMaxStreams> bytes = {};
  for (size_t c = 0; c < rows.size(); ++c) {
    const ChunkRow& row = rows[c];
    const int64_t n = shape.chunk_size(static_cast<int64_t>(c));
    bytes[kEscapeStream] += 2 * row.escapes;
    switch (row.method) {
      case ChunkMethod::kUnchanged:
        break;
      case ChunkMethod::kGaps:
        bytes[kGapStream] += row.changed + row.gap_extensions;
        bytes[kValueStream] += row.changed;
        break;
      case ChunkMethod::kBitmap:
        bytes[kBitmapStream] += (n + 7) / 8;
        bytes[kValueStream] += row.changed;
        break;
      case ChunkMethod::kDense:
        bytes[kLowStream] += n;
        bytes[kHighStream] += n;
        break;
      case ChunkMethod::kRaw:
        for (int64_t p = 0; p < shape.element_bytes; ++p) {
          bytes[static_cast<size_t>(kPlaneStream + p)] += n;
        }
        break;
    }
  }
  return bytes;
}

int64_t GroupEncoder::Scan(int64_t n, const uint16_t* before,
                           const uint16_t* after, bool few) {
  const auto room = static_cast<size_t>(n + kScanSlack);
  if (positions_.size() < room) {
    positions_.resize(room);
    values_.resize(room);
    escapes_.resize(room);
  }
  bitmap_.resize(kChunkElements / 64);
  int64_t changed = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = std::min(kBlock, n - i);
    uint64_t* bitmap = bitmap_.data() + i / 64;
    const int64_t count = FindChanges(before + i, after + i, size, bitmap);
    if (few) {
      uint16_t* positions = positions_.data() + changed;
      TakePositions(bitmap, size, i, positions);
      TakeChangesAt(before, after, positions, count, values_.data() + changed);
    }
    changed += count;
    checksums_.Add(after + i, 2 * size);
  }
  return changed;
}

void GroupEncoder::WriteValues(int64_t changed, ChunkRow& row) {
  ByteBuffer& values = streams_[kValueStream];
  const int64_t escapes =
      NarrowValues(values_.data(), changed, values.Room(changed + kScanSlack),
                   escapes_.data());
  values.Add(changed);
  uint8_t* bytes = streams_[kEscapeStream].Room(2 * escapes);
  for (int64_t i = 0; i < escapes; ++i) {
    const uint16_t z = escapes_[static_cast<size_t>(i)];
    bytes[2 * i] = static_cast<uint8_t>(z & 255);
    bytes[2 * i + 1] = static_cast<uint8_t>(z >> 8);
  }
  streams_[kEscapeStream].Add(2 * escapes);
  row.escapes = static_cast<int32_t>(escapes);
}

ChunkRow GroupEncoder::EncodeFloats(int64_t n, const uint16_t* before,
                                    const uint16_t* after) {
  // A guess; what is written does not depend on it.
  const bool few = density_ < kFewDensity;
  const int64_t changed = Scan(n, before, after, few);
  density_ = static_cast<double>(changed) / static_cast<double>(n);
  ChunkRow row;
  row.changed = static_cast<int32_t>(changed);
  if (changed == 0) return row;
  if (density_ > kDenseDensity) {
    row.method = ChunkMethod::kDense;
    DenseChanges(before, after, n, streams_[kLowStream].Room(n + kScanSlack),
                 streams_[kHighStream].Room(n + kScanSlack));
    streams_[kLowStream].Add(n);
    streams_[kHighStream].Add(n);
    return row;
  }
  const bool gaps_wanted = density_ < kBitmapDensity;
  if (!few) {
    TakeChanges(before, after, n, bitmap_.data(),
                gaps_wanted ? positions_.data() : nullptr, values_.data());
  }
  WriteValues(changed, row);
  if (gaps_wanted) {
    row.method = ChunkMethod::kGaps;
    ByteBuffer& gaps = streams_[kGapStream];
    const int64_t bytes =
        EncodeGaps(positions_.data(), changed,
                   gaps.Room(changed + kChunkElements / 255 + kScanSlack));
    gaps.Add(bytes);
    row.gap_extensions = static_cast<int32_t>(bytes - changed);
  } else {
    row.method = ChunkMethod::kBitmap;
    // Little-endian words are the bytes of the format.
    streams_[kBitmapStream].Append(bitmap_.data(), (n + 7) / 8);
  }
  return row;
}

ChunkRow GroupEncoder::EncodeRaw(int64_t n, int64_t element_bytes,
                                 const uint8_t* before, const uint8_t* after) {
  ChunkRow row;
  const int64_t bytes = n * element_bytes;
  checksums_.Add(after, bytes);
  if (before != nullptr &&
      std::memcmp(before, after, static_cast<size_t>(bytes)) == 0) {
    return row;
  }
  row.method = ChunkMethod::kRaw;
  row.changed = static_cast<int32_t>(n);
  for (int64_t p = 0; p < element_bytes; ++p) {
    ByteBuffer& plane = streams_[static_cast<size_t>(kPlaneStream + p)];
    TakePlane(after, n, element_bytes, p, plane.Room(n));
    plane.Add(n);
  }
  return row;
}

EncodedGroup GroupEncoder::Encode(const GroupShape& shape, const void* before,
                                  const void* after, const Options& options) {
  for (ByteBuffer& stream : streams_) stream.Clear();
  EncodedGroup out;
  out.group.chunks = shape.num_chunks();
  const auto* old_bytes = static_cast<const uint8_t*>(before);
  const auto* new_bytes = static_cast<const uint8_t*>(after);
  for (int64_t c = 0; c < out.group.chunks; ++c) {
    const int64_t n = shape.chunk_size(c);
    const bool raw = options.fresh || (!options.raw.empty() &&
                                       options.raw[static_cast<size_t>(c)]);
    checksums_.Reset();
    ChunkRow row =
        shape.floats16 && !raw
            ? EncodeFloats(n, reinterpret_cast<const uint16_t*>(old_bytes),
                           reinterpret_cast<const uint16_t*>(new_bytes))
            : EncodeRaw(n, shape.element_bytes, raw ? nullptr : old_bytes,
                        new_bytes);
    row.crc = checksums_.crc();
    out.hashes.push_back(checksums_.hash());
    if (options.fast && row.method == ChunkMethod::kGaps) {
      row.flags = kFlagFast;
    }
    out.rows.push_back(row);
    const int64_t bytes = n * shape.element_bytes;
    if (!options.fresh) old_bytes += bytes;
    new_bytes += bytes;
  }
  PackStreams(shape, options.fast, out);
  return out;
}

void GroupEncoder::PackStreams(const GroupShape& shape, bool fast,
                               EncodedGroup& out) {
  payload_.Clear();
  const auto num_streams =
      static_cast<size_t>(kPlaneStream + shape.element_bytes);
  for (size_t s = 0; s < num_streams; ++s) {
    const ByteBuffer& stream = streams_[s];
    if (fast) {
      payload_.Append(stream.data(), stream.size());
      out.group.sizes.push_back(stream.size());
      continue;
    }
    // High bytes of changes are mostly zero; raw planes may be anything.
    const auto content = s < kHighStream ? StreamPacker::Content::kNumbers
                                         : StreamPacker::Content::kRuns;
    out.group.sizes.push_back(
        packer_.Pack(stream.data(), stream.size(), content, payload_));
  }
  out.group.digest = HashBytes64(payload_.data(), payload_.size());
  out.payload.assign(reinterpret_cast<const char*>(payload_.data()),
                     static_cast<size_t>(payload_.size()));
}

}  // namespace gradwire
