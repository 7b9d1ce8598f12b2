// SPDX-License-Identifier: Apache-2.0
#include "sharding/gathered_weights.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "base/status.h"
#include "sharding/collective_error.h"

namespace gradwire {

int64_t UnitPlaces::total() const {
  return std::accumulate(elements.begin(), elements.end(), int64_t{0});
}

int UnitPlaces::FirstShared() const {
  std::vector<bool> taken(elements.size());
  for (size_t unit = 0; unit < of_unit.size(); ++unit) {
    const auto place = static_cast<size_t>(of_unit[unit]);
    if (taken[place]) return static_cast<int>(unit);
    taken[place] = true;
  }
  return static_cast<int>(of_unit.size());
}

UnitPlaces PlacesInTurns(const ShardLayout& layout) {
  const int last = layout.num_units() - 1;
  UnitPlaces places;
  places.elements.assign(3, 0);
  for (int unit = 1; unit < last; ++unit) {
    int64_t& elements = places.elements[static_cast<size_t>(unit % 2)];
    elements = std::max(elements, layout.PaddedSize(unit));
  }
  const int64_t block = std::max(places.elements[0], places.elements[1]);
  const bool share =
      std::min(layout.PaddedSize(0), layout.PaddedSize(last)) > block;
  places.elements[2] = layout.PaddedSize(0);
  places.of_unit.push_back(2);
  for (int unit = 1; unit < last; ++unit) places.of_unit.push_back(unit % 2);
  if (share) {
    places.of_unit.push_back(2);
    places.elements[2] = std::max(places.elements[2], layout.PaddedSize(last));
  } else {
    places.of_unit.push_back(3);
    places.elements.push_back(layout.PaddedSize(last));
  }
  return places;
}

UnitPlaces PlacesForAll(const ShardLayout& layout) {
  UnitPlaces places;
  for (int unit = 0; unit < layout.num_units(); ++unit) {
    places.of_unit.push_back(unit);
    places.elements.push_back(layout.PaddedSize(unit));
  }
  return places;
}

absl::StatusOr<std::unique_ptr<GatheredWeights>> GatheredWeights::Create(
    const ShardLayout& layout, const UnitPlaces& places, const Tensor& shard,
    Collectives& collectives, Device& device) {
  GW_CHECK(shard.num_elements() == layout.shard_elements());
  std::unique_ptr<GatheredWeights> weights(
      new GatheredWeights(layout, places, shard, collectives));
  const int64_t bytes = DTypeBytes(shard.dtype());
  GW_ASSIGN_OR_RETURN(weights->buffer_,
                      device.Allocate(places.total() * bytes));
  char* at = static_cast<char*>(weights->buffer_->data());
  for (const int64_t elements : places.elements) {
    weights->places_.emplace_back().memory =
        Tensor(at, shard.dtype(), {elements});
    at += elements * bytes;
  }
  return weights;
}

GatheredWeights::~GatheredWeights() {
  for (const Place& place : places_) {
    if (!place.on_its_way) continue;
    collectives_.Abort(RankStopped(collectives_.rank()));
    return;
  }
}

void GatheredWeights::Settle(Stream& stream, Place& place) {
  if (!place.on_its_way) return;
  place.on_its_way = false;
  const absl::Status status = collectives_.Wait(stream, place.ticket);
  if (!status.ok()) stream.Fail(status);
}

void GatheredWeights::Gather(Stream& stream, Place& place, int unit) {
  const ShardUnit& u = layout_.unit(unit);
  place.unit = unit;
  place.version = version_;
  place.on_its_way = true;
  place.ticket =
      collectives_.AllGather(stream, shard_.Rows(u.offset, u.offset + u.shard),
                             place.memory.Rows(0, layout_.PaddedSize(unit)));
}

void GatheredWeights::Prefetch(Stream& stream, int unit) {
  Place& place = PlaceOf(unit);
  if (place.held) return;
  if (place.unit == unit && place.version == version_) return;
  Settle(stream, place);
  Gather(stream, place, unit);
}

Tensor GatheredWeights::Acquire(Stream& stream, int unit) {
  Place& place = PlaceOf(unit);
  GW_CHECK(!place.held);
  Prefetch(stream, unit);
  Settle(stream, place);
  place.held = true;
  return place.memory.Rows(0, layout_.unit(unit).size());
}

void GatheredWeights::Release(int unit) {
  Place& place = PlaceOf(unit);
  GW_CHECK(place.held && place.unit == unit);
  place.held = false;
}

}  // namespace gradwire
