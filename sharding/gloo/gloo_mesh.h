// SPDX-License-Identifier: Apache-2.0
// The connections of one rank to all others: messages between memory here and
// there, and a common verdict when the group ends.
//
// gloo by itself leaves three things open, which are closed here. A connection
// that breaks within a message does not wake who waits for it: so a thread for
// each peer waits for a message that the peer sends only when it leaves, and
// sees it break. A timeout closes all connections before anybody can be told
// the reason: so a clock of ours ends the wait instead. And the peers of a rank
// that gave up would blame that rank: so it tells them whom to blame.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gloo/transport/context.h"
#include "gloo/transport/unbound_buffer.h"
#include "sharding/gloo/gloo_options.h"

namespace gradwire {

class GlooMesh;

// Messages between a stretch of memory and one peer, all one way. They arrive
// in the order in which they were posted. After a failure, or when this is
// destroyed, gloo no longer touches the memory.
class GlooTransfer {
 public:
  GlooTransfer(GlooMesh* mesh, int peer, void* data, int64_t bytes);

  // Posts a message of bytes [offset, offset + bytes); none if there are none.
  void Send(int64_t offset, int64_t bytes);
  void Receive(int64_t offset, int64_t bytes);

  // Waits until all messages have left the memory, or have come.
  absl::Status Wait();

 private:
  void Post(bool receive, int64_t offset, int64_t bytes);

  GlooMesh* mesh_;
  int peer_;
  bool receive_ = false;
  int posted_ = 0;  // and not waited for
  bool broken_ = false;
  std::unique_ptr<gloo::transport::UnboundBuffer> buffer_;
};

// Thread rule: one thread at a time; Interrupt, Blame, HasVerdict, FirstLeft
// and bytes_sent from any.
class GlooMesh {
 public:
  // Errors: see NewGlooCollectives.
  static absl::StatusOr<std::unique_ptr<GlooMesh>> Connect(
      const GlooOptions& options, const ExchangeAddresses& exchange);
  // Tells the peers that this rank leaves, unless they know.
  ~GlooMesh();

  int rank() const { return rank_; }
  int world() const { return world_; }
  // In errors.
  int NameOf(int rank) const {
    return names_.empty() ? rank : names_[static_cast<size_t>(rank)];
  }
  int64_t bytes_sent() const { return bytes_sent_; }

  // Begins a collective. Errors: the verdict.
  absl::Status Begin();
  // This rank ends the group.
  void Interrupt();
  // This rank ends the group since `late` did not come for the timeout.
  void Blame(int late);
  // Whether the group has ended, here or elsewhere, and End says why.
  bool HasVerdict() const;
  // A peer that has left, or -1. The others may go on without it, unless they
  // wait for it.
  int FirstLeft() const;
  // Ends the group because `peer` is of no use any more.
  absl::Status EndFor(int peer);
  // REQUIRES: a failure or an interruption. Tells the peers, closes the
  // connections and returns the verdict.
  absl::Status End();

 private:
  friend class GlooTransfer;

  using Buffer = gloo::transport::UnboundBuffer;

  // Why a group ended; sent as it is.
  struct Farewell {
    enum Reason : int32_t { kLeft, kAborted, kTimeout, kLost };
    int32_t reason = kLeft;
    int32_t rank = 0;  // who left, aborted, was waited for, was lost
  };
  struct Peer {
    Farewell said;  // gloo writes it
    std::unique_ptr<Buffer> farewell;
    std::thread watcher;
    // What it said, or that it was lost.
    std::optional<Farewell> gone;
  };
  // What the mesh's thread is blocked on.
  struct Waiting {
    Buffer* buffer;
    int peer;
    bool receive;
    std::chrono::steady_clock::time_point deadline;
  };

  explicit GlooMesh(const GlooOptions& options);
  absl::Status ConnectAll(const ExchangeAddresses& exchange);
  void StartThreads();

  absl::Status Wait(Buffer& buffer, int peer, bool receive);

  // The first verdict stays.
  void Decide(Farewell verdict) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Watch(int rank);
  void WatchTime();
  std::vector<std::unique_ptr<Buffer>> PostFarewells(const Farewell& farewell);
  void Flush(const std::vector<std::unique_ptr<Buffer>>& farewells);
  absl::Status ToStatus(const Farewell& verdict) const;

  Peer& peer(int rank) { return peers_[static_cast<size_t>(rank)]; }

  const int rank_;
  const int world_;
  const std::vector<int> names_;
  const absl::Duration timeout_;
  std::shared_ptr<gloo::transport::Context> context_;  // null in a world of 1

  // Of the mesh's thread.
  uint64_t slot_ = 0;  // of the collective that runs
  bool ended_ = false;
  Farewell last_words_;  // gloo reads it

  std::atomic<int64_t> bytes_sent_{0};

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Peer> peers_;  // `gone` is guarded by mutex_
  std::optional<Waiting> waiting_ ABSL_GUARDED_BY(mutex_);
  std::optional<Farewell> verdict_ ABSL_GUARDED_BY(mutex_);
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;

  std::thread clock_;
};

}  // namespace gradwire
