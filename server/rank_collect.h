// SPDX-License-Identifier: Apache-2.0
// What the ranks of a group say about one command, made one. Pure: no threads.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gradwire/v1/rank.pb.h"

namespace gradwire {

// Logprobs of a call in the order of its datums, whatever the order in which
// ranks send them.
class DatumOrder {
 public:
  // Takes the items of `chunk`, and returns those whose turn has come.
  std::vector<v1::LogprobItem> Add(v1::LogprobChunk& chunk);
  // Datums returned so far.
  int64_t count() const { return next_; }

 private:
  int64_t next_ = 0;
  std::map<int64_t, v1::LogprobItem> early_;
};

// The ranks' answers to one command.
class Answers {
 public:
  explicit Answers(int world) : dones_(static_cast<size_t>(world)) {}

  std::vector<v1::LogprobItem> AddLogprobs(v1::LogprobChunk& chunk) {
    return order_.Add(chunk);
  }
  // True once all ranks have answered.
  bool AddDone(int rank, v1::RankDone done);

  // The answer of the group: rank 0's, with one digest of all ranks' states; an
  // error is the first in rank order.
  // REQUIRES: all have answered.
  // Errors: INTERNAL INVARIANT_VIOLATED: the ranks' weights are not of one
  // step, only some say a digest of their state, or datums have no logprobs.
  absl::StatusOr<v1::RankDone> Take();
  // The most that any rank has used, class by class.
  v1::MemoryUse MostMemory() const;
  // What all of them have sent, and the longest that any was busy and waited.
  v1::CollectiveUse AllCollectives() const;

 private:
  DatumOrder order_;
  std::vector<std::optional<v1::RankDone>> dones_;
  size_t num_answers_ = 0;
};

// Collects what ranks tell their peers to reach them by.
class AddressExchange {
 public:
  explicit AddressExchange(int world) : world_(world) {}

  // All addresses of the group, once every rank has given its own. After that
  // the group's number may be used again.
  std::optional<v1::RankAddresses> Add(int rank, const v1::RankAddress& given);

 private:
  const int world_;
  std::map<int, std::map<int, std::string>> groups_;
};

}  // namespace gradwire
