// SPDX-License-Identifier: Apache-2.0
// Who may be a rank: what its hello must say, and the secret it must know.
// docs/sharding.md.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gradwire/v1/rank.pb.h"

namespace gradwire {

// Whether two secrets are the same, in a time that tells nothing but their
// lengths.
bool SameSecret(const std::string& a, const std::string& b);

// Errors: PERMISSION_DENIED RANK_TOKEN_WRONG; before anything else is said.
absl::Status CheckToken(const v1::RankHello& hello, const std::string& token);

// What a hello with the right token can still have wrong.
// Errors: FAILED_PRECONDITION RANK_VERSION_MISMATCH, RANK_WORLD_MISMATCH,
// RANK_OUT_OF_RANGE.
absl::Status CheckHello(const v1::RankHello& hello, int world_size);

// FAILED_PRECONDITION RANK_LATE: the world is complete.
absl::Status RankLate(const v1::RankHello& hello);
// FAILED_PRECONDITION RANK_GROUP_ENDED: the job has failed; if it is restarted,
// its ranks may come.
absl::Status RankGroupEnded(const v1::RankHello& hello);
// ALREADY_EXISTS RANK_DUPLICATE: another process is this rank.
absl::Status RankDuplicate(const v1::RankHello& hello);
// NOT_FOUND RANK_JOB_UNKNOWN.
absl::Status RankJobUnknown(const v1::RankHello& hello);

// The token that is in a file, without the white space around it.
// Errors: FAILED_PRECONDITION JOIN_TOKEN_UNUSABLE: it cannot be read, others
// can read or write it, or it has fewer than 32 characters.
absl::StatusOr<std::string> ReadJoinToken(const std::string& path);

}  // namespace gradwire
