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
  // they are zero. All must outlive it.
  static absl::StatusOr<std::unique_ptr<ReducedGradients>> Create(
      const ShardLayout& layout, const UnitPlaces& places, const Tensor& shard,
      Collectives& collectives, Device& device);
  ~ReducedGradients() override;

  void Start(bool accumulate) override { accumulate_ = accumulate; }
  Place Begin(Stream& stream, int unit) override;
  void End(Stream& stream, int unit) override;
  // Has elements [begin, end) of a unit's gradient there; what it is called for
  // may overlap.
  using MakePart = std::function<void(int64_t begin, int64_t end)>;
  // As End, but piece by piece, an equal part of every shard each: those pieces
  // that have not ended and of which nothing lies outside elements [begin, end)
  // of the unit. Each is sent as soon as `make`, unless it is null, has made
  // it. The unit has ended when all of it has; then there is nothing to do.
  // REQUIRES: pieces end in the same order on all ranks, in however many calls.
  void EndPart(Stream& stream, int unit, int64_t begin, int64_t end,
               const MakePart& make);
  void Finish(Stream& stream) override;

  // The memory of a unit's gradient, f32 1-D, for other use in stream order
  // until the next Begin. REQUIRES: the unit is not held.
  Tensor Spare(Stream& stream, int unit);

  int64_t bytes() const { return buffer_->bytes(); }

 private:
  struct Buffer {
    Tensor memory;  // f32, 1-D
    int unit = -1;  // that was begun last
    bool held = false;
    bool on_its_way = false;
    // Of a unit that ends in parts, which pieces have ended.
    std::vector<bool> sent;
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

  const ShardLayout& layout_;
  const std::vector<int> place_of_;
  const Tensor shard_;
  Collectives& collectives_;
  Device& device_;
  std::unique_ptr<DeviceBuffer> buffer_;
  std::vector<Buffer> buffers_;
  bool accumulate_ = false;
};

}  // namespace gradwire
