// SPDX-License-Identifier: Apache-2.0
#include "sharding/gloo/gloo_mesh.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "base/status.h"
#include "sharding/collective_error.h"

namespace gradwire {
namespace {

using Milliseconds = std::chrono::milliseconds;

// gloo's own timeouts close all connections at once; none is ever reached.
constexpr Milliseconds kNever = std::chrono::hours(24 * 365);
// How long a rank that ends stays to hear or to say why.
constexpr Milliseconds kGrace{300};

constexpr uint64_t kFarewellSlot = 0;

}  // namespace

GlooTransfer::GlooTransfer(GlooMesh* mesh, int peer, void* data, int64_t bytes)
    : mesh_(mesh),
      peer_(peer),
      buffer_(mesh->context_->createUnboundBuffer(
          data, static_cast<size_t>(bytes))) {}

void GlooTransfer::Send(int64_t offset, int64_t bytes) {
  Post(/*receive=*/false, offset, bytes);
}

void GlooTransfer::Receive(int64_t offset, int64_t bytes) {
  Post(/*receive=*/true, offset, bytes);
}

void GlooTransfer::Post(bool receive, int64_t offset, int64_t bytes) {
  if (bytes == 0 || broken_) return;
  GW_CHECK(!mesh_->ended_);
  receive_ = receive;
  try {
    if (receive) {
      buffer_->recv(peer_, mesh_->slot_, static_cast<size_t>(offset),
                    static_cast<size_t>(bytes));
    } else {
      buffer_->send(peer_, mesh_->slot_, static_cast<size_t>(offset),
                    static_cast<size_t>(bytes));
      mesh_->bytes_sent_ += bytes;
    }
    ++posted_;
  } catch (const std::exception&) {
    broken_ = true;
  }
}

absl::Status GlooTransfer::Wait() {
  for (; posted_ > 0; --posted_) {
    GW_RETURN_IF_ERROR(mesh_->Wait(*buffer_, peer_, receive_));
  }
  return broken_ ? mesh_->EndFor(peer_) : absl::OkStatus();
}

GlooMesh::GlooMesh(const GlooOptions& options)
    : rank_(options.rank),
      world_(options.world),
      names_(options.names),
      timeout_(std::min(options.timeout, absl::FromChrono(kNever))),
      peers_(static_cast<size_t>(options.world)) {}

GlooMesh::~GlooMesh() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Decide({Farewell::kLeft, rank_});
    stop_ = true;
  }
  (void)End();
  changed_.notify_all();
  for (Peer& peer : peers_) {
    if (!peer.watcher.joinable()) continue;
    peer.farewell->abortWaitRecv();
    peer.watcher.join();
  }
  if (clock_.joinable()) clock_.join();
}

void GlooMesh::StartThreads() {
  for (int rank = 0; rank < world_; ++rank) {
    if (rank == rank_) continue;
    Peer& p = peer(rank);
    p.farewell = context_->createUnboundBuffer(&p.said, sizeof(p.said));
    p.farewell->recv(rank, kFarewellSlot);
    p.watcher = std::thread([this, rank] { Watch(rank); });
  }
  clock_ = std::thread([this] { WatchTime(); });
}

absl::Status GlooMesh::Begin() {
  ++slot_;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!verdict_) return absl::OkStatus();
  }
  return End();
}

absl::Status GlooMesh::Wait(Buffer& buffer, int peer, bool receive) {
  std::unique_lock<std::mutex> lock(mutex_);
  bool done = false, broken = false;
  if (!verdict_) {
    const auto deadline =
        std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout_);
    waiting_ = Waiting{&buffer, peer, receive, deadline};
    lock.unlock();
    try {
      done = receive ? buffer.waitRecv(kNever) : buffer.waitSend(kNever);
    } catch (const std::exception&) {
      broken = true;
    }
    lock.lock();
    waiting_.reset();
  }
  lock.unlock();
  if (done) return absl::OkStatus();
  return broken ? EndFor(peer) : End();
}

absl::Status GlooMesh::EndFor(int rank) {
  {
    // Its watcher sees the same, and what the peer may have said before.
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, kGrace,
                      [&] { return verdict_ || peer(rank).gone.has_value(); });
    Decide(peer(rank).gone.value_or(Farewell{Farewell::kLost, rank}));
  }
  return End();
}

void GlooMesh::Interrupt() {
  std::lock_guard<std::mutex> lock(mutex_);
  Decide({Farewell::kAborted, rank_});
}

void GlooMesh::Blame(int late) {
  std::lock_guard<std::mutex> lock(mutex_);
  Decide({Farewell::kTimeout, late});
}

bool GlooMesh::HasVerdict() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return verdict_.has_value();
}

int GlooMesh::FirstLeft() const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int rank = 0; rank < world_; ++rank) {
    const std::optional<Farewell>& gone =
        peers_[static_cast<size_t>(rank)].gone;
    if (gone && gone->reason == Farewell::kLeft) return rank;
  }
  return -1;
}

void GlooMesh::Decide(Farewell verdict) {
  if (verdict_) return;
  verdict_ = verdict;
  if (waiting_ && waiting_->receive) waiting_->buffer->abortWaitRecv();
  if (waiting_ && !waiting_->receive) waiting_->buffer->abortWaitSend();
  changed_.notify_all();
}

void GlooMesh::Watch(int rank) {
  Peer& p = peer(rank);
  Farewell gone = {Farewell::kLost, rank};
  std::string how = "it said what nobody says";
  try {
    if (!p.farewell->waitRecv(kNever)) return;
    if (Farewell::kLeft <= p.said.reason && p.said.reason <= Farewell::kLost &&
        0 <= p.said.rank && p.said.rank < world_) {
      gone = p.said;
    }
  } catch (const std::exception& e) {
    how = e.what();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (gone.reason == Farewell::kLost && gone.rank == rank && !verdict_) {
    spdlog::warn("collectives: rank {} lost rank {}: {}", rank_, rank, how);
  }
  p.gone = gone;
  changed_.notify_all();
  // One that has all it needs may leave while others still wait for others.
  if (gone.reason == Farewell::kLeft) return;
  // Who waits for a rank that itself waits has not found the culprit.
  if (gone.reason == Farewell::kTimeout && gone.rank == rank_ && waiting_) {
    gone.rank = waiting_->peer;
  }
  Decide(gone);
}

void GlooMesh::WatchTime() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    const auto now = std::chrono::steady_clock::now();
    if (waiting_ && waiting_->deadline <= now) {
      Decide({Farewell::kTimeout, waiting_->peer});
    }
    // A wait that begins after now ends after this, too.
    auto wake = now + absl::ToChronoNanoseconds(timeout_);
    if (waiting_ && !verdict_) wake = waiting_->deadline;
    changed_.wait_until(lock, wake, [&] { return stop_; });
  }
}

absl::Status GlooMesh::End() {
  std::unique_lock<std::mutex> lock(mutex_);
  GW_CHECK(verdict_.has_value());
  if (ended_) return ToStatus(*verdict_);
  ended_ = true;
  const Farewell verdict = *verdict_;
  lock.unlock();
  const auto farewells = PostFarewells(verdict);
  lock.lock();
  if (verdict.reason != Farewell::kLeft) {
    // A connection that is closed with something unread drops what is on its
    // way to the peer. So both sides read until they have heard each other.
    changed_.wait_for(lock, kGrace, [&] {
      return std::all_of(peers_.begin(), peers_.end(), [](const Peer& p) {
        return !p.farewell || p.gone.has_value();
      });
    });
  }
  if (verdict.reason == Farewell::kTimeout && verdict.rank != rank_) {
    // If that rank is alive it knows better; see Watch.
    const std::optional<Farewell>& said = peer(verdict.rank).gone;
    if (said && said->reason == Farewell::kTimeout && said->rank != rank_) {
      verdict_ = said;
    }
  }
  const absl::Status status = ToStatus(*verdict_);
  lock.unlock();
  if (verdict.reason == Farewell::kLeft) Flush(farewells);
  // Pair::close would drop what the kernel still holds for the peer; destroying
  // a pair does not.
  for (int rank = 0; context_ && rank < world_; ++rank) {
    context_->getPair(rank).reset();
  }
  return status;
}

std::vector<std::unique_ptr<GlooMesh::Buffer>> GlooMesh::PostFarewells(
    const Farewell& farewell) {
  last_words_ = farewell;
  std::vector<std::unique_ptr<Buffer>> posted;
  for (int rank = 0; rank < world_; ++rank) {
    if (!peer(rank).farewell) continue;
    auto buffer =
        context_->createUnboundBuffer(&last_words_, sizeof(last_words_));
    try {
      buffer->send(rank, kFarewellSlot);
      posted.push_back(std::move(buffer));
    } catch (const std::exception&) {
      // It is gone, and does not miss anything.
    }
  }
  return posted;
}

void GlooMesh::Flush(const std::vector<std::unique_ptr<Buffer>>& farewells) {
  try {
    // A peer that reads nothing holds this up once.
    for (const auto& farewell : farewells) farewell->waitSend(kGrace);
  } catch (const std::exception&) {
  }
}

absl::Status GlooMesh::ToStatus(const Farewell& verdict) const {
  switch (verdict.reason) {
    case Farewell::kTimeout:
      return CollectiveTimeout(NameOf(verdict.rank), timeout_);
    case Farewell::kLeft:
      return CollectiveFailed(NameOf(verdict.rank), "it left the group");
    case Farewell::kAborted:
      return CollectiveFailed(NameOf(verdict.rank), "it ended the group");
    default:
      return CollectiveFailed(NameOf(verdict.rank), "its connection broke");
  }
}

}  // namespace gradwire
