// SPDX-License-Identifier: Apache-2.0
// The weights of a sharded model: gathered unit by unit, ahead of their use.
// docs/sharding.md.
//
// A place for a gathered unit knows which unit and version lies in it, so that
// what is still there is not gathered again: the last block of a forward is the
// first of its backward. Blocks take turns in two places; the first and the
// last unit, which hold the embedding and the head, have places of their own,
// or share one if both are large.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "device/device.h"
#include "sharding/collectives.h"
#include "sharding/layout.h"
#include "sharding/units.h"

namespace gradwire {

// Which of `num_places` places each unit takes, and how large they are.
struct UnitPlaces {
  std::vector<int> of_unit;
  std::vector<int64_t> elements;

  int64_t total() const;
  // How many units, from the first on, have places of their own.
  int FirstShared() const;
};
// Two for blocks. The first and the last unit share one if each is larger than
// a block.
UnitPlaces PlacesInTurns(const ShardLayout& layout);
// One for each unit.
UnitPlaces PlacesForAll(const ShardLayout& layout);

class GatheredWeights : public UnitWeights {
 public:
  // `shard`: act [layout.shard_elements()], this rank's. All must outlive it.
  static absl::StatusOr<std::unique_ptr<GatheredWeights>> Create(
      const ShardLayout& layout, const UnitPlaces& places, const Tensor& shard,
      Collectives& collectives, Device& device);
  // No gather is on its way any more.
  ~GatheredWeights() override;

  void Prefetch(Stream& stream, int unit) override;
  Tensor Acquire(Stream& stream, int unit) override;
  void Release(int unit) override;
  void NewVersion() override { ++version_; }
  int room() const override { return room_; }

  int64_t bytes() const { return buffer_->bytes(); }

 private:
  struct Place {
    Tensor memory;  // act, 1-D
    int unit = -1;
    int64_t version = -1;
    bool held = false;
    bool on_its_way = false;
    Collectives::Ticket ticket = 0;
  };
  GatheredWeights(const ShardLayout& layout, const UnitPlaces& places,
                  const Tensor& shard, Collectives& collectives)
      : layout_(layout),
        place_of_(places.of_unit),
        room_(places.FirstShared()),
        shard_(shard),
        collectives_(collectives) {}
  Place& PlaceOf(int unit) {
    return places_[static_cast<size_t>(place_of_[static_cast<size_t>(unit)])];
  }
  // Waits for what is on its way to a place.
  void Settle(Stream& stream, Place& place);
  void Gather(Stream& stream, Place& place, int unit);

  const ShardLayout& layout_;
  const std::vector<int> place_of_;
  const int room_;
  const Tensor shard_;
  Collectives& collectives_;
  std::unique_ptr<DeviceBuffer> buffer_;
  std::vector<Place> places_;
  int64_t version_ = 0;
};

}  // namespace gradwire
