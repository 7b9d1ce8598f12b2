// SPDX-License-Identifier: Apache-2.0
// Which rank holds which elements of the flat parameter vector: arithmetic
// only, for any number of ranks. docs/sharding.md.
//
// The vector is cut into units (the embedding, each block, the tail), and every
// unit into one shard for each rank, all of one length; the last shards may
// reach past the unit's end, or lie behind it. A rank's shards of all units lie
// one behind the other in its shard vector. With one rank the shard vector is
// the flat vector.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gradwire {

// A piece of the flat vector that is gathered and reduced as a whole.
struct ShardUnit {
  int64_t begin = 0, end = 0;  // elements of the flat vector
  int64_t shard = 0;   // elements of each rank's shard, padding included
  int64_t offset = 0;  // of the shard, in the shard vector

  int64_t size() const { return end - begin; }
};

// Elements of the flat vector that lie together on one rank.
struct ShardPiece {
  int rank = 0;
  int64_t begin = 0, end = 0;  // elements of the flat vector
  int64_t offset = 0;          // of `begin`, in the rank's shard vector

  int64_t size() const { return end - begin; }
};

class ShardLayout {
 public:
  // Shards begin at multiples of this at least, in elements of the unit...
  static constexpr int64_t kMinAlignment = 64;
  // ... and of the largest power of two up to this for which padding stays
  // below 1/64 of the unit: a group of chunks of a delta then has one owner.
  static constexpr int64_t kMaxAlignment = 65536;

  // Unit i begins at `begins[i]` and ends where the next begins, the last at
  // `num_elements`. REQUIRES: world >= 1; begins ascends from 0; begins and
  // num_elements are multiples of kMinAlignment.
  ShardLayout(std::vector<int64_t> begins, int64_t num_elements, int world);

  int world() const { return world_; }
  int num_units() const { return static_cast<int>(units_.size()); }
  const ShardUnit& unit(int i) const { return units_[static_cast<size_t>(i)]; }
  // Length of the flat vector.
  int64_t num_elements() const { return num_elements_; }
  // Length of each rank's shard vector.
  int64_t shard_elements() const { return shard_elements_; }
  // world() shards of a unit, one behind the other: what gathering it fills.
  int64_t PaddedSize(int unit) const {
    return units_[static_cast<size_t>(unit)].shard * world_;
  }
  // The unit of an element.
  int UnitOf(int64_t element) const;
  // What `rank` holds of a unit; empty (begin == end) if nothing.
  ShardPiece Owned(int unit, int rank) const;
  // Elements [begin, end) by owner, in ascending order; their sizes add up.
  std::vector<ShardPiece> Pieces(int64_t begin, int64_t end) const;

 private:
  int world_;
  int64_t num_elements_;
  int64_t shard_elements_ = 0;
  std::vector<ShardUnit> units_;
};

}  // namespace gradwire
