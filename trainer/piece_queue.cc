// SPDX-License-Identifier: Apache-2.0
#include "trainer/piece_queue.h"

#include <iterator>
#include <utility>

namespace gradwire {

void PieceQueue::Push(Piece piece) {
  const int64_t bytes = std::ssize(piece.bytes);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] {
    return closed_ || pieces_.empty() || bytes_ + bytes <= most_bytes_;
  });
  if (closed_) return;
  bytes_ += bytes;
  pieces_.push_back(std::move(piece));
  changed_.notify_all();
}

void PieceQueue::End(const absl::Status& status) {
  const std::lock_guard lock(mutex_);
  ended_ = status;
  changed_.notify_all();
}

absl::StatusOr<std::optional<PieceQueue::Piece>> PieceQueue::Take() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !pieces_.empty() || ended_.has_value(); });
  if (pieces_.empty()) {
    if (!ended_->ok()) return *ended_;
    return std::nullopt;
  }
  std::optional<Piece> piece = std::move(pieces_.front());
  pieces_.pop_front();
  bytes_ -= std::ssize(piece->bytes);
  changed_.notify_all();
  return piece;
}

void PieceQueue::Close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  pieces_.clear();
  bytes_ = 0;
  changed_.notify_all();
}

}  // namespace gradwire
