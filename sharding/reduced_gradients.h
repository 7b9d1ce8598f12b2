// SPDX-License-Identifier: Apache-2.0
// The gradients of a sharded model: a unit's is summed over the ranks, in
// float32 and in rank order, as soon as the backward has left it, and added to
// its owners' shards. docs/sharding.md.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "device/device.h"
#include "sharding/collectives.h"
#include "sharding/gathered_weights.h"
#include "sharding/layout.h"
#include "sharding/units.h"

namespace gradwire {

class ReducedGradients : public UnitGradients {
 public:
  // `shard`: f32 [layout.shard_elements()], where sums go. Beyond a unit's end
  // they are zero. `slow_unit`: that EndInPieces may be called of, or -1. All
  // must outlive it.
  static absl::StatusOr<std::unique_ptr<ReducedGradients>> Create(
      const ShardLayout& layout, const UnitPlaces& places, const Tensor& shard,
      int slow_unit, Collectives& collectives, Device& device);
  // Of the memory that it takes.
  static int64_t Bytes(const ShardLayout& layout, const UnitPlaces& places,
                       int slow_unit);
  ~ReducedGradients() override;

  void Start(bool accumulate) override { accumulate_ = accumulate; }
  Place Begin(Stream& stream, int unit) override;
  void End(Stream& stream, int unit) override;
  void Finish(Stream& stream) override;

  // As End, of a unit that nobody waits for, sent in pieces: two at once, and
  // one behind each block, all of which end after it, so that no gather has to
  // wait for all of it. `make` makes elements [begin, end) of the unit's
  // gradient, before they are sent; what it is called for may overlap.
  void EndInPieces(Stream& stream, int unit,
                   std::function<void(int64_t begin, int64_t end)> make);
  // The memory of a unit's gradient, f32 1-D, for other use in stream order
  // until the next Begin. REQUIRES: the unit is not held; all blocks have
  // ended.
  Tensor Spare(Stream& stream, int unit);

  int64_t bytes() const { return buffer_->bytes(); }

 private:
  struct Buffer {
    Tensor memory;  // f32, 1-D
    bool held = false;
    bool on_its_way = false;
    Collectives::Ticket ticket = 0;
  };
  ReducedGradients(const ShardLayout& layout, const UnitPlaces& places,
                   const Tensor& shard, Collectives& collectives,
                   Device& device)
      : layout_(layout),
        place_of_(places.of_unit),
        shard_(shard),
        collectives_(collectives),
        device_(device) {}
  Buffer& BufferOf(int unit) {
    return buffers_[static_cast<size_t>(place_of_[static_cast<size_t>(unit)])];
  }
  void Settle(Stream& stream, Buffer& buffer);
  void SendPiece(Stream& stream);

  const ShardLayout& layout_;
  const std::vector<int> place_of_;
  const Tensor shard_;
  Collectives& collectives_;
  Device& device_;
  std::unique_ptr<DeviceBuffer> buffer_;
  std::vector<Buffer> buffers_;
  // The unit that is being sent in pieces, or -1; where the next one begins in
  // each shard.
  int slow_unit_ = -1;
  int64_t next_piece_ = 0;
  std::function<void(int64_t, int64_t)> make_;
  // Where pieces are put together, in turns.
  Buffer pieces_[2];
  bool accumulate_ = false;
};

}  // namespace gradwire
