// SPDX-License-Identifier: Apache-2.0
#include "server/rank_group_join.h"

#include "base/error.h"
#include "base/status.h"

namespace gradwire {

absl::StatusOr<std::unique_ptr<Collectives>> JoinRankGroup(
    const RankGroupJoin& join) {
  if (join.world == 1) return nullptr;
  GW_RETURN_IF_ERROR(join.exchange("").status());
  return ErrorBuilder(absl::StatusCode::kUnimplemented,
                      "COLLECTIVES_UNAVAILABLE")
      .Server()
      .With("field", "world_size")
      .With("value", join.world)
      .With("limit", 1)
      .Message(
          "This build has no collectives; create the job with "
          "world_size 1.");
}

}  // namespace gradwire
