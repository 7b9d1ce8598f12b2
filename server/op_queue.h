// SPDX-License-Identifier: Apache-2.0
// The order of one handle's operations: by seq_id, whatever the order of
// arrival. Pure: no threads, no clock of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/operation.h"

namespace gradwire {

class OpQueue {
 public:
  struct Limits {
    int64_t max_ops = 64;
    int64_t max_bytes = int64_t{2} << 30;
    std::chrono::milliseconds gap_timeout = std::chrono::seconds(600);
  };
  // Behind it there are numbers left for what follows.
  static constexpr int64_t kMaxSeq = int64_t{1} << 62;

  explicit OpQueue(const Limits& limits) : limits_(limits) {}

  // Admits `op`, or returns the operation that has its seq_id and digest
  // already. The one that fills the lowest gap is admitted even when the queue
  // is full.
  // Errors: INVALID_ARGUMENT SEQ_INVALID (below 1, above kMaxSeq), SEQ_REUSED
  // (another digest); FAILED_PRECONDITION SEQUENCE_CLOSED; RESOURCE_EXHAUSTED
  // QUEUE_FULL.
  absl::StatusOr<OperationPtr> Submit(OperationPtr op, Clock::time_point now);

  // What Submit would answer, judged by key alone, before the payload has been
  // received: OK, SEQ_INVALID or SEQUENCE_CLOSED.
  absl::Status CheckSeq(int64_t seq) const;

  // The operation with this number, or null.
  OperationPtr Find(int64_t seq) const;

  // The last number of those behind `seq` that are, without one between, of
  // operations that `passes` says yes to, or were closed. However many were.
  int64_t PassThrough(
      int64_t seq,
      const std::function<bool(const Operation& op)>& passes) const;

  // The operation whose turn it is, or null, also while it is being logged; the
  // caller runs it: its state becomes RUNNING and the next number's turn comes.
  OperationPtr TakeNext();

  // Removes a queued operation from the queue; its number counts as executed.
  // False if it is not queued.
  bool Cancel(const OperationPtr& op);

  // Registers `op` as executed although it never runs. REQUIRES: its number is
  // at or above next_seq() and not in use.
  void Close(const OperationPtr& op);

  // Takes back what Submit admitted: its number stays open. Nothing happens if
  // it is not queued any more.
  void Withdraw(const OperationPtr& op);

  // Takes an operation of an earlier process, which has ended or is to run. In
  // any order, before anything else.
  void Restore(const OperationPtr& op, Clock::time_point now);
  // Numbers below `seq` that nothing is known of were closed. Operations there
  // that wait, as their end was decided and not recorded, leave the queue and
  // are returned.
  std::vector<OperationPtr> CloseBelow(int64_t seq);

  // Ends the wait behind a gap: once nothing has arrived for gap_timeout, and
  // the missing number is not held, all waiting operations leave the queue,
  // are returned, and the missing numbers are closed.
  std::vector<OperationPtr> ExpireGap(Clock::time_point now);

  // All queued operations leave the queue, in order.
  std::vector<OperationPtr> Drain();

  // Every operation that there is, in order.
  void Visit(const std::function<void(const Operation& op)>& visit) const {
    for (const auto& [seq, op] : all_) visit(*op);
  }

  // All who wait for an operation look again.
  void WakeAll();

  // While a number is held by a live stream, its gap does not time out.
  void Hold(int64_t seq) { held_.insert(seq); }
  void Unhold(int64_t seq, Clock::time_point now);

  int64_t next_seq() const { return next_seq_; }
  int64_t queued() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t queued_bytes() const { return queued_bytes_; }
  // Operations that run before it.
  int64_t Position(const OperationPtr& op) const;
  bool BlockedOnGap(const OperationPtr& op) const;

 private:
  int64_t LowestGap() const;
  void Remove(std::map<int64_t, OperationPtr>::iterator it);
  void SkipExecuted();

  const Limits limits_;
  int64_t next_seq_ = 1;
  // Every operation that was admitted, for the life of the handle.
  std::map<int64_t, OperationPtr> all_;
  // Those of `all_` that are still queued.
  std::map<int64_t, OperationPtr> waiting_;
  // Numbers at or above next_seq_ that count as executed.
  std::set<int64_t> executed_;
  std::multiset<int64_t> held_;
  int64_t queued_bytes_ = 0;
  Clock::time_point last_arrival_;
};

}  // namespace gradwire
