// SPDX-License-Identifier: Apache-2.0
#include "server/rank_collect.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"
#include "server/payload_digest.h"

namespace gradwire {
namespace {

absl::Status Violated(const std::string& check, const std::string& ranks,
                      const std::string& message) {
  return ErrorBuilder(absl::StatusCode::kInternal, "INVARIANT_VIOLATED")
      .Server()
      .With("check", check)
      .With("ranks", ranks)
      .Message(message +
               " This is a mistake of ours; please report it with "
               "the server's log. The weights are lost: restart the "
               "job, or create another.");
}

std::string Versions(const v1::RankDone& done) {
  return "weight version " + std::to_string(done.weight_version()) + ", step " +
         std::to_string(done.optimizer_step());
}

}  // namespace

std::vector<v1::LogprobItem> DatumOrder::Add(v1::LogprobChunk& chunk) {
  std::vector<v1::LogprobItem> due;
  for (v1::LogprobItem& item : *chunk.mutable_items()) {
    if (item.datum_index() == next_) {
      due.push_back(std::move(item));
      ++next_;
    } else if (item.datum_index() > next_) {
      const int64_t index = item.datum_index();
      early_.emplace(index, std::move(item));
    }
    while (!early_.empty() && early_.begin()->first == next_) {
      due.push_back(std::move(early_.begin()->second));
      early_.erase(early_.begin());
      ++next_;
    }
  }
  return due;
}

bool Answers::AddDone(int rank, v1::RankDone done) {
  std::optional<v1::RankDone>& place = dones_[static_cast<size_t>(rank)];
  if (!place.has_value()) ++num_answers_;
  place = std::move(done);
  return num_answers_ == dones_.size();
}

absl::StatusOr<v1::RankDone> Answers::Take() {
  v1::RankDone& first = *dones_[0];
  for (size_t rank = 1; rank < dones_.size(); ++rank) {
    const v1::RankDone& other = *dones_[rank];
    if (other.weight_version() != first.weight_version() ||
        other.optimizer_step() != first.optimizer_step()) {
      return Violated("weight_version", "0," + std::to_string(rank),
                      "Rank 0 is at " + Versions(first) + ", but rank " +
                          std::to_string(rank) + " is at " + Versions(other) +
                          ".");
    }
  }
  for (std::optional<v1::RankDone>& done : dones_) {
    if (done->has_error()) {
      *first.mutable_error() = v1::OperationError(done->error());
      first.clear_result();
      first.clear_state_digest();
      return std::move(first);
    }
  }
  if (first.has_forward() && order_.count() != first.forward().datum_count()) {
    return Violated("logprobs", "all",
                    "The ranks sent logprobs of " +
                        std::to_string(order_.count()) + " of " +
                        std::to_string(first.forward().datum_count()) +
                        " datums.");
  }
  std::string digests;
  for (const std::optional<v1::RankDone>& done : dones_) {
    if (done->state_digest().size() != first.state_digest().size()) {
      return Violated("state_digest", "all",
                      "Only some of the ranks sent a digest of their state.");
    }
    digests += done->state_digest();
  }
  if (!digests.empty()) {
    first.set_state_digest(PayloadDigest::OfBytes(digests));
  }
  return std::move(first);
}

v1::MemoryUse Answers::MostMemory() const {
  v1::MemoryUse most;
  for (const std::optional<v1::RankDone>& done : dones_) {
    const v1::MemoryUse& use = done->memory_use();
    most.set_weights(std::max(most.weights(), use.weights()));
    most.set_gradients(std::max(most.gradients(), use.gradients()));
    most.set_optimizer(std::max(most.optimizer(), use.optimizer()));
    most.set_activations(std::max(most.activations(), use.activations()));
    most.set_workspace(std::max(most.workspace(), use.workspace()));
    most.set_other(std::max(most.other(), use.other()));
    most.set_total(std::max(most.total(), use.total()));
    most.set_resident_peak(std::max(most.resident_peak(), use.resident_peak()));
  }
  return most;
}

v1::CollectiveUse Answers::AllCollectives() const {
  v1::CollectiveUse all;
  for (const std::optional<v1::RankDone>& done : dones_) {
    const v1::CollectiveUse& use = done->collective_use();
    all.set_bytes_sent(all.bytes_sent() + use.bytes_sent());
    all.set_collectives(std::max(all.collectives(), use.collectives()));
    all.set_busy_seconds(std::max(all.busy_seconds(), use.busy_seconds()));
    all.set_wait_seconds(std::max(all.wait_seconds(), use.wait_seconds()));
  }
  return all;
}

std::optional<v1::RankAddresses> AddressExchange::Add(
    int rank, const v1::RankAddress& given) {
  std::map<int, std::string>& of = groups_[given.group()];
  of[rank] = given.address();
  if (static_cast<int>(of.size()) < world_) return std::nullopt;
  v1::RankAddresses all;
  all.set_group(given.group());
  for (auto& [from, address] : of) all.add_address(std::move(address));
  groups_.erase(given.group());
  return all;
}

}  // namespace gradwire
