// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/packer.h"

// For ZSTD_c_literalCompressionMode.
#define ZSTD_STATIC_LINKING_ONLY
#include <zstd.h>

#include "base/check.h"

namespace gradwire {
namespace {

// Far apart enough for a search that finds nothing to cost nothing.
constexpr int kSearchStep = 1000;

ZSTD_CCtx* NewContext(StreamPacker::Content content) {
  ZSTD_CCtx* context = ZSTD_createCCtx();
  GW_CHECK(context != nullptr);
  ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, 1);
  if (content == StreamPacker::Content::kNumbers) {
    // Numbers without order repeat by accident only. A match costs more than
    // the entropy code of what it replaces, in bytes and on both sides in time;
    // so hardly any are looked for. A library that refuses this still makes a
    // frame that everybody can read.
    ZSTD_CCtx_setParameter(context, ZSTD_c_strategy, ZSTD_fast);
    ZSTD_CCtx_setParameter(context, ZSTD_c_targetLength, kSearchStep);
    ZSTD_CCtx_setParameter(context, ZSTD_c_minMatch, 7);
    ZSTD_CCtx_setParameter(context, ZSTD_c_literalCompressionMode,
                           ZSTD_ps_enable);
  }
  return context;
}

// Writes a frame behind what is in `out`; returns its size.
int64_t Compress(ZSTD_CCtx* context, const uint8_t* in, int64_t bytes,
                 ByteBuffer& out) {
  const size_t bound = ZSTD_compressBound(static_cast<size_t>(bytes));
  const size_t packed =
      ZSTD_compress2(context, out.Room(static_cast<int64_t>(bound)), bound, in,
                     static_cast<size_t>(bytes));
  GW_CHECK(!ZSTD_isError(packed));
  return static_cast<int64_t>(packed);
}

}  // namespace

StreamPacker::~StreamPacker() {
  ZSTD_freeCCtx(numbers_);
  ZSTD_freeCCtx(runs_);
}

ZSTD_CCtx* StreamPacker::Context(Content content) {
  ZSTD_CCtx*& context = content == Content::kNumbers ? numbers_ : runs_;
  if (context == nullptr) context = NewContext(content);
  return context;
}

int64_t StreamPacker::Pack(const uint8_t* in, int64_t bytes, Content content,
                           ByteBuffer& out) {
  if (bytes == 0) return 0;
  const int64_t packed = Compress(Context(content), in, bytes, out);
  if (packed < bytes) {
    out.Add(packed);
    return packed;
  }
  out.Append(in, bytes);
  return bytes;
}

int64_t StreamPacker::PackFrame(const uint8_t* in, int64_t bytes,
                                ByteBuffer& out) {
  const int64_t packed = Compress(Context(Content::kRuns), in, bytes, out);
  out.Add(packed);
  return packed;
}

StreamUnpacker::~StreamUnpacker() { ZSTD_freeDCtx(context_); }

const uint8_t* StreamUnpacker::Unpack(const uint8_t* stored,
                                      int64_t stored_bytes, int64_t bytes,
                                      ByteBuffer& buffer) {
  if (stored_bytes == bytes) return stored;
  const size_t size = static_cast<size_t>(stored_bytes);
  // No second frame and nothing behind: two readers must not differ.
  if (ZSTD_getFrameContentSize(stored, size) != static_cast<uint64_t>(bytes) ||
      ZSTD_findFrameCompressedSize(stored, size) != size) {
    return nullptr;
  }
  if (context_ == nullptr) context_ = ZSTD_createDCtx();
  GW_CHECK(context_ != nullptr);
  uint8_t* out = buffer.Room(bytes);
  const size_t got = ZSTD_decompressDCtx(
      context_, out, static_cast<size_t>(bytes), stored, size);
  if (ZSTD_isError(got) || got != static_cast<size_t>(bytes)) return nullptr;
  buffer.Add(bytes);
  return out;
}

}  // namespace gradwire
