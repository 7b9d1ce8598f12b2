// SPDX-License-Identifier: Apache-2.0
// Whether a group of ranks must end, and who is to blame, as one pure function.
// docs/sharding.md.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "server/operation.h"

namespace gradwire {

// What is known of one rank.
struct RankStanding {
  // Not OK: its process is gone.
  absl::Status exited;
  // Not OK: what it said that ends the group, and when.
  absl::Status report;
  Clock::time_point reported;
  // Its stream has ended, and when.
  bool lost = false;
  Clock::time_point lost_at;
  // Whether signs of life are due, and the last one.
  bool watched = false;
  Clock::time_point last_seen;
};

struct VerdictRules {
  // A rank that is silent for so long is hung.
  Clock::duration silence = std::chrono::seconds(30);
  // How long a report about peers, or the end of a local rank's stream, waits
  // for what tells more: the end of a process, what other ranks say.
  Clock::duration grace = std::chrono::seconds(1);
  // Ranks have processes that are watched.
  bool local = true;
};

// The error that ends the group, naming the rank to blame; OK: none, or not
// yet. In this order: a process that is gone, a rank that is silent, a stream
// that has ended, what ranks reported. A rank's report about itself goes before
// reports about peers; of these the rank that is named most often is to blame,
// sooner one that has said nothing itself, and it is called hung if it has also
// missed heartbeats.
absl::Status Judge(const std::vector<RankStanding>& ranks,
                   Clock::time_point now, const VerdictRules& rules);

}  // namespace gradwire
