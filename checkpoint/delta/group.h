// SPDX-License-Identifier: Apache-2.0
// Up to 128 chunks of one tensor and one shard, which share a zstd frame for
// each kind of stream.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "checkpoint/delta/byte_buffer.h"
#include "checkpoint/delta/chunk_table.h"
#include "checkpoint/delta/packer.h"
#include "checkpoint/delta/patch.h"
#include "checkpoint/delta/tensor_hash.h"

namespace gradwire {

// In the order in which they are stored. kPlane is followed by the planes of
// the element's other bytes.
enum DeltaStream {
  kGapStream,
  kBitmapStream,
  kValueStream,
  kEscapeStream,
  kLowStream,
  kHighStream,
  kPlaneStream,
};
inline constexpr int64_t kMaxElementBytes = 8;
inline constexpr size_t kMaxStreams = kPlaneStream + kMaxElementBytes;

struct DeltaGroup {
  int64_t chunks = 0;
  // Stored bytes of each stream; [kPlaneStream + element bytes].
  std::vector<int64_t> sizes;
  uint64_t digest = 0;  // XXH3-64 of the stored bytes

  int64_t stored_bytes() const;
  bool operator==(const DeltaGroup&) const = default;
};

struct GroupShape {
  int64_t num_elements = 0;   // of the group
  int64_t element_bytes = 0;  // 1, 2, 4 or 8
  // Whether the elements are 16-bit floats, which are subtracted. Others, and
  // tensors that were not there before, are stored as they are.
  bool floats16 = false;

  int64_t num_chunks() const { return NumChunks(num_elements); }
  int64_t chunk_size(int64_t chunk) const {
    return std::min(kChunkElements, num_elements - chunk * kChunkElements);
  }
};

// Bytes of each stream before packing, by the table.
std::array<int64_t, kMaxStreams> StreamBytes(const GroupShape& shape,
                                             absl::Span<const ChunkRow> rows);

struct EncodedGroup {
  DeltaGroup group;
  std::vector<ChunkRow> rows;   // [chunks]
  std::vector<Hash128> hashes;  // [chunks], of the new bytes
  std::string payload;          // the stored streams
};

// Thread rule: one thread each. Keeps what the streams of a group take between
// calls.
class GroupEncoder {
 public:
  struct Options {
    bool fast = false;   // store, do not pack
    bool fresh = false;  // there is no `before`
    // Which chunks are stored whole though there is one; empty: none.
    std::vector<bool> raw = {};
  };
  // `before` and `after` hold shape.num_elements each, aligned to them;
  // `before` is null if fresh.
  EncodedGroup Encode(const GroupShape& shape, const void* before,
                      const void* after, const Options& options);

 private:
  // Their sums are in checksums_ afterwards.
  ChunkRow EncodeFloats(int64_t n, const uint16_t* before,
                        const uint16_t* after);
  ChunkRow EncodeRaw(int64_t n, int64_t element_bytes, const uint8_t* before,
                     const uint8_t* after);
  // Fills bitmap_; if few are expected also positions_ and values_. Returns how
  // many changed.
  int64_t Scan(int64_t n, const uint16_t* before, const uint16_t* after,
               bool few);
  void WriteValues(int64_t changed, ChunkRow& row);
  void PackStreams(const GroupShape& shape, bool fast, EncodedGroup& out);

  StreamPacker packer_;
  Checksums checksums_;
  std::array<ByteBuffer, kMaxStreams> streams_;
  ByteBuffer payload_;
  std::vector<uint16_t> positions_, values_, escapes_;
  std::vector<uint64_t> bitmap_;
  // Of the chunk before.
  double density_ = 0;
};

enum class GroupResult {
  kOk,
  kCorrupt,   // the streams are not what the table says
  kMismatch,  // the weights come out with another checksum
};

// Thread rule: one thread each.
class GroupDecoder {
 public:
  struct Options {
    bool check = true;  // the checksum of each chunk
    // Where old bytes of raw chunks are appended, in the order of the chunks;
    // Undo needs them. Null: they are of no worth.
    ByteBuffer* saved = nullptr;
  };
  // Applies the group to its part of the weights, in place. On any error the
  // weights are what they were (but raw chunks, if not saved).
  // REQUIRES: `weights` is aligned to its elements, `stored` as long as the
  // group says; the rows have passed ReadChunkTable, and no stored size is
  // above StreamBytes.
  GroupResult Decode(const GroupShape& shape, absl::Span<const ChunkRow> rows,
                     const DeltaGroup& group, const uint8_t* stored,
                     Options options, void* weights);

  // Gives back the weights from before a Decode that succeeded with the same
  // arguments. `saved`: what that Decode appended.
  void Undo(const GroupShape& shape, absl::Span<const ChunkRow> rows,
            const DeltaGroup& group, const uint8_t* stored,
            const uint8_t* saved, void* weights);

 private:
  // The next byte of each stream.
  using Cursor = std::array<const uint8_t*, kMaxStreams>;

  bool Unpack(const GroupShape& shape, absl::Span<const ChunkRow> rows,
              const DeltaGroup& group, const uint8_t* stored, Cursor& cursor);
  // Adds or subtracts what a changed chunk of floats says; false, with nothing
  // done, if that makes no sense. `crc`: of the weights afterwards.
  bool PatchChunk(const ChunkRow& row, int64_t n, Direction direction,
                  Cursor& cursor, uint16_t* weights, uint32_t& crc);
  // False, with nothing done, if the checksum differs.
  bool PutRaw(const ChunkRow& row, int64_t n, int64_t element_bytes,
              const Options& options, Cursor& cursor, uint8_t* weights);
  void UndoChunks(const GroupShape& shape, absl::Span<const ChunkRow> rows,
                  Cursor cursor, const uint8_t* saved, uint8_t* weights);

  StreamUnpacker unpacker_;
  std::array<ByteBuffer, kMaxStreams> streams_;
  std::vector<uint16_t> differences_;
  std::vector<uint8_t> scratch_;
};

}  // namespace gradwire
