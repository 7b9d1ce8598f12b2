// SPDX-License-Identifier: Apache-2.0
// Pieces of a model's parameters on their way from the thread that gathers them
// to the one that writes them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace gradwire {

// Thread rule: one that pushes and one that takes.
class PieceQueue {
 public:
  struct Piece {
    std::vector<char> bytes;
    int64_t elements = 0;
  };

  // Holds pieces of so many bytes at most, or one that has more.
  explicit PieceQueue(int64_t most_bytes) : most_bytes_(most_bytes) {}

  // Waits for room. After Close it drops the piece.
  void Push(Piece piece);
  // No more pieces come: because all have, or because of an error.
  void End(const absl::Status& status);

  // Waits for a piece. After the last one nothing, or the error of End.
  absl::StatusOr<std::optional<Piece>> Take();
  // Nobody takes any more.
  void Close();

 private:
  const int64_t most_bytes_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Piece> pieces_;           // guarded by mutex_
  int64_t bytes_ = 0;                  // guarded by mutex_; of pieces_
  std::optional<absl::Status> ended_;  // guarded by mutex_
  bool closed_ = false;                // guarded by mutex_
};

}  // namespace gradwire
