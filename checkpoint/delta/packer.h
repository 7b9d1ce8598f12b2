// SPDX-License-Identifier: Apache-2.0
// Streams as they are stored: one zstd frame if that is smaller, else
// themselves. Which of both is told by the size. Thread rule: one thread each.
#pragma once

#include <cstdint>
#include <memory>

#include "checkpoint/delta/byte_buffer.h"

struct ZSTD_CCtx_s;
struct ZSTD_DCtx_s;

namespace gradwire {

class StreamPacker {
 public:
  enum class Content {
    kNumbers,  // gaps, values, bitmaps: independent bytes, no repeats
    kRuns,     // anything else: long runs, or unknown
  };
  StreamPacker() = default;
  StreamPacker(const StreamPacker&) = delete;
  StreamPacker& operator=(const StreamPacker&) = delete;
  ~StreamPacker();

  // Appends `in` [bytes] to `out`, packed; returns how many bytes that took,
  // from 1 to `bytes`. 0 for no bytes.
  int64_t Pack(const uint8_t* in, int64_t bytes, Content content,
               ByteBuffer& out);
  // The same as a zstd frame in any case, for others who expect one. Level 1.
  int64_t PackFrame(const uint8_t* in, int64_t bytes, ByteBuffer& out);

 private:
  ZSTD_CCtx_s* Context(Content content);

  // Null until they are needed: streams that are stored need none.
  ZSTD_CCtx_s* numbers_ = nullptr;
  ZSTD_CCtx_s* runs_ = nullptr;
};

class StreamUnpacker {
 public:
  StreamUnpacker() = default;
  StreamUnpacker(const StreamUnpacker&) = delete;
  StreamUnpacker& operator=(const StreamUnpacker&) = delete;
  ~StreamUnpacker();

  // The `bytes` that `stored` stands for: `stored` itself, or in `buffer`,
  // which they are appended to. Null unless it is one frame of just that size.
  // REQUIRES: 0 < stored_bytes <= bytes.
  const uint8_t* Unpack(const uint8_t* stored, int64_t stored_bytes,
                        int64_t bytes, ByteBuffer& buffer);

 private:
  ZSTD_DCtx_s* context_ = nullptr;  // until it is needed
};

}  // namespace gradwire
