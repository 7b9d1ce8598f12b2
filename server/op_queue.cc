// SPDX-License-Identifier: Apache-2.0
#include "server/op_queue.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {

absl::Status OpQueue::CheckSeq(int64_t seq) const {
  if (seq < 1 || seq > kMaxSeq) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "SEQ_INVALID")
        .With("field", "seq_id")
        .With("value", seq)
        .With("limit", seq < 1 ? 1 : kMaxSeq)
        .Message("seq_id starts at 1, and each request takes the next number.");
  }
  if (seq < next_seq_ && all_.count(seq) == 0) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "SEQUENCE_CLOSED")
        .With("field", "seq_id")
        .With("value", seq)
        .With("limit", next_seq_)
        .Message("seq_id " + std::to_string(seq) +
                 " was closed when the wait for it timed out. Send the "
                 "request again with the next free number.");
  }
  return absl::OkStatus();
}

int64_t OpQueue::LowestGap() const {
  int64_t seq = next_seq_;
  while (waiting_.count(seq) != 0 || executed_.count(seq) != 0) ++seq;
  return seq;
}

absl::StatusOr<OperationPtr> OpQueue::Submit(OperationPtr op,
                                             Clock::time_point now) {
  GW_RETURN_IF_ERROR(CheckSeq(op->seq));
  if (OperationPtr earlier = Find(op->seq); earlier != nullptr) {
    if (earlier->digest == op->digest) return earlier;
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "SEQ_REUSED")
        .With("field", "seq_id")
        .With("value", op->seq)
        .Message("seq_id " + std::to_string(op->seq) +
                 " was used for another request. Every request takes the next "
                 "number; only a repetition takes the same.");
  }
  const bool fills_gap = op->seq == LowestGap();
  if (!fills_gap && (queued() >= limits_.max_ops ||
                     queued_bytes_ + op->bytes > limits_.max_bytes)) {
    const bool ops = queued() >= limits_.max_ops;
    return ErrorBuilder(absl::StatusCode::kResourceExhausted, "QUEUE_FULL")
        .Server()
        .With("field", ops ? "queued_ops" : "queued_bytes")
        .With("value", ops ? queued() : queued_bytes_ + op->bytes)
        .With("limit", ops ? limits_.max_ops : limits_.max_bytes)
        .With("retry_after_seconds", 0.2)
        .Message(
            "The model's queue is full. Wait for results, then send the "
            "request again.");
  }
  all_[op->seq] = op;
  waiting_[op->seq] = op;
  queued_bytes_ += op->bytes;
  last_arrival_ = now;
  return op;
}

OperationPtr OpQueue::Find(int64_t seq) const {
  auto it = all_.find(seq);
  return it == all_.end() ? nullptr : it->second;
}

int64_t OpQueue::PassThrough(
    int64_t seq, const std::function<bool(const Operation& op)>& passes) const {
  for (auto it = all_.upper_bound(seq);; ++it) {
    const int64_t known =
        it == all_.end() ? next_seq_ : std::min(it->first, next_seq_);
    // Those between were closed.
    seq = std::max(seq, known - 1);
    if (it == all_.end() || it->first != seq + 1 || !passes(*it->second)) {
      return seq;
    }
    seq = it->first;
  }
}

void OpQueue::Remove(std::map<int64_t, OperationPtr>::iterator it) {
  queued_bytes_ -= it->second->bytes;
  waiting_.erase(it);
}

void OpQueue::SkipExecuted() {
  while (!executed_.empty() && *executed_.begin() == next_seq_) {
    executed_.erase(executed_.begin());
    ++next_seq_;
  }
}

OperationPtr OpQueue::TakeNext() {
  auto it = waiting_.find(next_seq_);
  if (it == waiting_.end() || it->second->logging) return nullptr;
  OperationPtr op = it->second;
  Remove(it);
  ++next_seq_;
  SkipExecuted();
  return op;
}

bool OpQueue::Cancel(const OperationPtr& op) {
  auto it = waiting_.find(op->seq);
  if (it == waiting_.end() || it->second != op) return false;
  Remove(it);
  executed_.insert(op->seq);
  SkipExecuted();
  return true;
}

void OpQueue::Close(const OperationPtr& op) {
  all_[op->seq] = op;
  executed_.insert(op->seq);
  SkipExecuted();
}

void OpQueue::Withdraw(const OperationPtr& op) {
  auto it = waiting_.find(op->seq);
  if (it == waiting_.end() || it->second != op) return;
  Remove(it);
  all_.erase(op->seq);
}

void OpQueue::Restore(const OperationPtr& op, Clock::time_point now) {
  all_[op->seq] = op;
  if (op->Ended()) {
    executed_.insert(op->seq);
    SkipExecuted();
    return;
  }
  waiting_[op->seq] = op;
  queued_bytes_ += op->bytes;
  last_arrival_ = now;
}

std::vector<OperationPtr> OpQueue::CloseBelow(int64_t seq) {
  next_seq_ = std::max(next_seq_, seq);
  executed_.erase(executed_.begin(), executed_.lower_bound(next_seq_));
  std::vector<OperationPtr> closed;
  while (!waiting_.empty() && waiting_.begin()->first < next_seq_) {
    closed.push_back(waiting_.begin()->second);
    Remove(waiting_.begin());
  }
  SkipExecuted();
  return closed;
}

std::vector<OperationPtr> OpQueue::ExpireGap(Clock::time_point now) {
  if (waiting_.empty() || waiting_.begin()->first == next_seq_ ||
      now - last_arrival_ < limits_.gap_timeout) {
    return {};
  }
  auto held = held_.lower_bound(next_seq_);
  if (held != held_.end() && *held < waiting_.begin()->first) return {};
  return Drain();
}

std::vector<OperationPtr> OpQueue::Drain() {
  std::vector<OperationPtr> out;
  for (auto& [seq, op] : waiting_) out.push_back(op);
  if (!out.empty()) {
    next_seq_ = out.back()->seq + 1;
    executed_.erase(executed_.begin(), executed_.lower_bound(next_seq_));
    SkipExecuted();
  }
  waiting_.clear();
  queued_bytes_ = 0;
  return out;
}

void OpQueue::WakeAll() {
  for (const auto& [seq, op] : all_) op->changed.SignalAll();
}

void OpQueue::Unhold(int64_t seq, Clock::time_point now) {
  auto it = held_.find(seq);
  if (it != held_.end()) held_.erase(it);
  last_arrival_ = std::max(last_arrival_, now);
}

int64_t OpQueue::Position(const OperationPtr& op) const {
  auto it = waiting_.find(op->seq);
  return it == waiting_.end() ? 0 : std::distance(waiting_.begin(), it);
}

bool OpQueue::BlockedOnGap(const OperationPtr& op) const {
  return waiting_.count(op->seq) != 0 && op->seq > LowestGap();
}

}  // namespace gradwire
