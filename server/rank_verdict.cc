// SPDX-License-Identifier: Apache-2.0
#include "server/rank_verdict.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "base/error.h"
#include "server/rank_errors.h"

namespace gradwire {
namespace {

// Three heartbeats missed.
constexpr Clock::duration kSuspicious = std::chrono::milliseconds(3500);

// The rank that a report is about, or -1.
int Named(const absl::Status& report, int world) {
  const auto detail = GetErrorDetail(report);
  int rank = -1;
  if (!detail || detail->metadata.count("rank") == 0 ||
      !absl::SimpleAtoi(detail->metadata.at("rank"), &rank) || rank >= world) {
    return -1;
  }
  return rank;
}

// REQUIRES: a rank has reported, and all reports are about peers.
absl::Status Blame(const std::vector<RankStanding>& ranks,
                   Clock::time_point now) {
  const int world = static_cast<int>(ranks.size());
  // Two for each that names it, one more for having said nothing.
  std::vector<int> votes(ranks.size(), 0);
  std::vector<int> reporter(ranks.size(), -1);
  int first = -1;
  for (int rank = 0; rank < world; ++rank) {
    const RankStanding& standing = ranks[static_cast<size_t>(rank)];
    if (standing.report.ok()) continue;
    if (first < 0) first = rank;
    const int named = Named(standing.report, world);
    if (named < 0 || named == rank) continue;
    votes[static_cast<size_t>(named)] += 2;
    int& who = reporter[static_cast<size_t>(named)];
    if (who < 0) who = rank;
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (votes[rank] > 0 && ranks[rank].report.ok()) ++votes[rank];
  }
  const auto most = std::max_element(votes.begin(), votes.end());
  if (*most == 0) {
    return RankBlamed(first, first, ranks[static_cast<size_t>(first)].report);
  }
  const auto blamed = static_cast<size_t>(most - votes.begin());
  const Clock::duration silence = now - ranks[blamed].last_seen;
  if (ranks[blamed].watched && silence > kSuspicious) {
    return RankHung(static_cast<int>(blamed), absl::FromChrono(silence));
  }
  const int by = reporter[blamed];
  return RankBlamed(static_cast<int>(blamed), by,
                    ranks[static_cast<size_t>(by)].report);
}

absl::Status JudgeReports(const std::vector<RankStanding>& ranks,
                          Clock::time_point now, const VerdictRules& rules) {
  size_t reports = 0;
  Clock::time_point oldest = now;
  for (const RankStanding& rank : ranks) {
    if (rank.report.ok()) continue;
    ++reports;
    oldest = std::min(oldest, rank.reported);
  }
  if (reports == 0 || (reports < ranks.size() && now - oldest < rules.grace)) {
    return absl::OkStatus();
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const absl::Status& report = ranks[rank].report;
    if (report.ok() || IsCollectiveFailure(report)) continue;
    if (ranks.size() == 1) return report;
    return WithErrorMetadata(report, "rank", std::to_string(rank));
  }
  return Blame(ranks, now);
}

}  // namespace

absl::Status Judge(const std::vector<RankStanding>& ranks,
                   Clock::time_point now, const VerdictRules& rules) {
  for (const RankStanding& rank : ranks) {
    if (!rank.exited.ok()) return rank.exited;
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const Clock::duration silence = now - ranks[rank].last_seen;
    if (ranks[rank].watched && silence > rules.silence) {
      return RankHung(static_cast<int>(rank), absl::FromChrono(silence));
    }
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (ranks[rank].lost &&
        (!rules.local || now - ranks[rank].lost_at >= rules.grace)) {
      return RankLost(static_cast<int>(rank));
    }
  }
  return JudgeReports(ranks, now, rules);
}

}  // namespace gradwire
