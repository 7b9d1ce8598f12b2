// SPDX-License-Identifier: Apache-2.0
// Which part of an operation each rank of a group is sent. Pure functions.
// docs/sharding.md.
#pragma once

#include <cstdint>
#include <vector>

#include "google/protobuf/repeated_field.h"
#include "gradwire/v1/rank.pb.h"
#include "server/operation.h"

namespace gradwire {

// What the ranks are sent for one operation.
struct Dispatch {
  // [rank]: what is for this one alone, in order.
  std::vector<std::vector<v1::RankCommand>> own;
  // What is for all of them, after their own; unset: nothing.
  v1::RankCommand command;
};

// Gives each datum and each gradient to its rank, and tells all of them who has
// what. Moves, and copies no batch. `rank_of` and `shapes` are of all datums of
// the call, or of the forward that a backward is of; both may be empty if
// world is 1.
Dispatch ShareRequest(OperationRequest request,
                      const std::vector<DatumShape>& shapes,
                      const std::vector<int>& rank_of, int world,
                      int64_t command_id);

// The rank's side: the indices in the call of the datums that it has, in order.
// All `count` of them if `rank_of` is empty, as with one rank.
std::vector<int64_t> OwnDatums(
    const google::protobuf::RepeatedField<int32_t>& rank_of, int rank,
    int64_t count);

}  // namespace gradwire
