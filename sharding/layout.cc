// SPDX-License-Identifier: Apache-2.0
#include "sharding/layout.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace gradwire {
namespace {

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t ShardSize(int64_t size, int world) {
  if (world == 1) return size;  // nothing begins behind it
  const int64_t even = (size + world - 1) / world;
  for (int64_t alignment = ShardLayout::kMaxAlignment;
       alignment > ShardLayout::kMinAlignment; alignment /= 2) {
    const int64_t shard = RoundUp(even, alignment);
    if ((shard * world - size) * 64 < size) return shard;
  }
  return RoundUp(even, ShardLayout::kMinAlignment);
}

}  // namespace

ShardLayout::ShardLayout(std::vector<int64_t> begins, int64_t num_elements,
                         int world)
    : world_(world), num_elements_(num_elements) {
  GW_CHECK(world >= 1);
  GW_CHECK(!begins.empty() && begins[0] == 0);
  begins.push_back(num_elements);
  for (size_t i = 0; i + 1 < begins.size(); ++i) {
    GW_CHECK(begins[i] <= begins[i + 1]);
    GW_CHECK(begins[i + 1] % kMinAlignment == 0);
    ShardUnit unit;
    unit.begin = begins[i];
    unit.end = begins[i + 1];
    unit.shard = ShardSize(unit.size(), world);
    unit.offset = shard_elements_;
    shard_elements_ += unit.shard;
    units_.push_back(unit);
  }
}

int ShardLayout::UnitOf(int64_t element) const {
  GW_CHECK(0 <= element && element < num_elements_);
  const auto behind = std::upper_bound(
      units_.begin(), units_.end(), element,
      [](int64_t e, const ShardUnit& unit) { return e < unit.begin; });
  return static_cast<int>(behind - units_.begin()) - 1;
}

ShardPiece ShardLayout::Owned(int unit, int rank) const {
  GW_CHECK(0 <= unit && unit < num_units());
  GW_CHECK(0 <= rank && rank < world_);
  const ShardUnit& u = this->unit(unit);
  ShardPiece piece;
  piece.rank = rank;
  piece.begin = std::min(u.begin + rank * u.shard, u.end);
  piece.end = std::min(piece.begin + u.shard, u.end);
  piece.offset = u.offset;
  return piece;
}

std::vector<ShardPiece> ShardLayout::Pieces(int64_t begin, int64_t end) const {
  GW_CHECK(0 <= begin && begin <= end && end <= num_elements_);
  std::vector<ShardPiece> pieces;
  while (begin < end) {
    const int unit = UnitOf(begin);
    const ShardUnit& u = this->unit(unit);
    ShardPiece piece =
        Owned(unit, static_cast<int>((begin - u.begin) / u.shard));
    piece.offset += begin - piece.begin;
    piece.begin = begin;
    piece.end = std::min(piece.end, end);
    begin = piece.end;
    pieces.push_back(piece);
  }
  return pieces;
}

}  // namespace gradwire
