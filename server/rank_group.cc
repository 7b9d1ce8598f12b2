// SPDX-License-Identifier: Apache-2.0
// A group's life: its processes and streams, how they come and how they go. See
// rank_group_events.cc for what ranks say meanwhile.
#include "server/rank_group.h"

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "server/rank_cpus.h"
#include "server/rank_errors.h"
#include "server/rank_hello.h"

namespace gradwire {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(250);
// A watch that comes so late has been stopped itself, and has heard nobody.
constexpr auto kOverslept = std::chrono::seconds(2);
// From the start of a process to its hello.
constexpr auto kStart = std::chrono::seconds(60);
// Ranks that live see within a heartbeat that their group has ended.
constexpr auto kFarewell = std::chrono::seconds(2);

}  // namespace

RankGroup::RankGroup(RankGroupOptions options,
                     std::function<void(GroupEvent)> on_event)
    : options_(std::move(options)),
      on_event_(std::move(on_event)),
      addresses_(options_.world_size) {
  for (int rank = 0; rank < options_.world_size; ++rank) {
    seats_.push_back(std::make_unique<Seat>());
  }
  watch_ = std::thread([this] { Watch(); });
}

RankGroup::~RankGroup() {
  Stop();
  // Which goes on until the last process is gone.
  watch_.join();
  for (const std::unique_ptr<Seat>& seat : seats_) seat->process.reset();
}

void RankGroup::Start() {
  {
    absl::MutexLock lock(&mu_);
    starting_ = true;
  }
  for (int rank = 0; local() && rank < options_.world_size; ++rank) {
    StartProcess(rank);
  }
  {
    absl::MutexLock lock(&mu_);
    starting_ = false;
    // Others may take their time to start them.
    if (!local()) outbox_.push_back({.kind = GroupEvent::kJoined});
    CheckEnded();
  }
  Deliver();
}

void RankGroup::StartProcess(int rank) {
  {
    absl::MutexLock lock(&mu_);
    if (ending_) return;
    ++num_processes_;
    seat(rank).standing.watched = true;
    seat(rank).standing.last_seen = Clock::now() + kStart;
  }
  const std::vector<int> cpus = AllowedCpus();
  const int threads = ThreadsOfRank(
      options_.threads, static_cast<int>(cpus.size()), options_.world_size);
  const std::vector<int> own =
      CpusOfRank(cpus, rank, options_.world_size, threads);
  std::vector<std::string> argv = {
      options_.rank_binary,
      "--supervisor=" + options_.rank_address,
      "--job_id=" + options_.job_id,
      "--rank=" + std::to_string(rank),
      "--world_size=" + std::to_string(options_.world_size),
      "--device=" + options_.device +
          (options_.device == "cuda" ? ":" + std::to_string(rank) : ""),
      "--threads=" + std::to_string(threads),
      "--dial_timeout_seconds=0"};
  if (!own.empty()) argv.push_back("--cpus=" + FormatCpus(own));
  auto process = RankProcess::Start(
      argv, {{"GRADWIRE_JOIN_TOKEN", options_.join_token}},
      [this, rank](int wait_status) { OnExit(rank, wait_status); });
  absl::MutexLock lock(&mu_);
  if (!process.ok()) {
    --num_processes_;
    Fail(process.status());
    return;
  }
  seat(rank).process = *std::move(process);
  if (ending_) seat(rank).process->Kill();
}

void RankGroup::OnExit(int rank, int wait_status) {
  options_.metrics->SetRankUp(options_.job_id, rank, false);
  {
    absl::MutexLock lock(&mu_);
    --num_processes_;
    if (ending_) {
      spdlog::info("job {}: rank {} has stopped", options_.job_id, rank);
    } else {
      seat(rank).standing.exited = RankExited(rank, wait_status);
      JudgeNow();
    }
    CheckEnded();
  }
  Deliver();
}

void RankGroup::Stop() {
  {
    absl::MutexLock lock(&mu_);
    End();
    CheckEnded();
  }
  Deliver();
}

void RankGroup::Fail(const absl::Status& status) {
  if (ending_) return;
  failure_ = status;
  outbox_.push_back({.kind = GroupEvent::kFailed, .status = status});
  End();
}

void RankGroup::End() {
  if (ending_) return;
  ending_ = true;
  ending_since_ = Clock::now();
  for (const std::unique_ptr<Seat>& seat : seats_) {
    if (seat->process != nullptr) seat->process->Kill();
  }
}

void RankGroup::CheckEnded() {
  if (!ending_ || ended_ || starting_ || num_processes_ > 0) return;
  for (const std::unique_ptr<Seat>& seat : seats_) {
    if (seat->stream != nullptr) return;
  }
  ended_ = true;
  outbox_.push_back({.kind = GroupEvent::kEnded});
  ended_changed_.SignalAll();
}

void RankGroup::Watch() {
  Clock::time_point last = Clock::now();
  mu_.Lock();
  while (!ended_) {
    ended_changed_.WaitWithTimeout(&mu_, kTick);
    const Clock::time_point now = Clock::now();
    const bool overslept = now - last > kOverslept;
    for (int rank = 0; rank < options_.world_size; ++rank) {
      RankStanding& standing = seat(rank).standing;
      if (overslept) standing.last_seen = std::max(standing.last_seen, now);
      if (!standing.watched || ending_) continue;
      const std::chrono::duration<double> age = now - standing.last_seen;
      options_.metrics->SetHeartbeatAge(options_.job_id, rank,
                                        std::max(0.0, age.count()));
    }
    last = now;
    JudgeNow();
    if (ending_ && now - ending_since_ > kFarewell) {
      for (const std::unique_ptr<Seat>& seat : seats_) {
        if (seat->stream != nullptr) seat->stream->Cancel();
      }
    }
    CheckEnded();
    mu_.Unlock();
    Deliver();
    mu_.Lock();
  }
  mu_.Unlock();
}

void RankGroup::JudgeNow() {
  if (ending_) return;
  VerdictRules rules;
  rules.silence = absl::ToChronoNanoseconds(options_.rank_timeout);
  rules.local = local();
  std::vector<RankStanding> ranks;
  for (const std::unique_ptr<Seat>& seat : seats_) {
    ranks.push_back(seat->standing);
    if (!MayReplace() || seat->stream == nullptr) continue;
    if (Clock::now() - seat->standing.last_seen > rules.silence) {
      seat->stream->Cancel();
    }
  }
  if (MayReplace()) return;
  if (absl::Status verdict = Judge(ranks, Clock::now(), rules); !verdict.ok()) {
    Fail(verdict);
  }
}

// ---- Streams ---------------------------------------------------------------

int RankGroup::CountJoined() const {
  return static_cast<int>(
      std::count_if(seats_.begin(), seats_.end(),
                    [](const auto& seat) { return seat->stream != nullptr; }));
}

absl::Status RankGroup::CheckSeat(const v1::RankHello& hello) const {
  if (ending_) return RankGroupEnded(hello);
  if (complete_) return RankLate(hello);
  return seats_[static_cast<size_t>(hello.rank())]->stream == nullptr
             ? absl::OkStatus()
             : RankDuplicate(hello);
}

absl::Status RankGroup::Join(const v1::RankHello& hello, RankStream* stream) {
  GW_RETURN_IF_ERROR(CheckToken(hello, options_.join_token));
  GW_RETURN_IF_ERROR(CheckHello(hello, options_.world_size));
  {
    absl::MutexLock lock(&mu_);
    GW_RETURN_IF_ERROR(CheckSeat(hello));
  }
  Seat& seat = this->seat(hello.rank());
  int joined = 0;
  {
    // Whoever is told that the world is complete waits for this to be written.
    absl::MutexLock write_lock(&seat.write_mu);
    {
      absl::MutexLock lock(&mu_);
      GW_RETURN_IF_ERROR(CheckSeat(hello));
      seat.stream = stream;
      seat.standing = RankStanding();
      seat.standing.watched = true;
      seat.standing.last_seen = Clock::now();
      joined = CountJoined();
      complete_ = joined == options_.world_size;
      outbox_.push_back({.kind = GroupEvent::kJoined, .joined = joined});
      spdlog::info("job {}: rank {} has joined, pid {}; {} of {}",
                   options_.job_id, hello.rank(), hello.pid(), joined,
                   options_.world_size);
    }
    seat.writer = stream;
    v1::RankCommand welcome;
    welcome.mutable_joined()->set_joined(joined);
    welcome.mutable_joined()->set_world_size(options_.world_size);
    stream->Write(welcome);
  }
  options_.metrics->SetRankUp(options_.job_id, hello.rank(), true);
  Deliver();
  return absl::OkStatus();
}

absl::Status RankGroup::Leave(int rank) {
  options_.metrics->SetRankUp(options_.job_id, rank, false);
  Seat& seat = this->seat(rank);
  absl::Status end;
  {
    absl::MutexLock write_lock(&seat.write_mu);
    seat.writer = nullptr;
    absl::MutexLock lock(&mu_);
    seat.stream = nullptr;
    if (!ending_ && MayReplace()) {
      seat.standing = RankStanding();
      spdlog::info("job {}: rank {} has left", options_.job_id, rank);
      outbox_.push_back({.kind = GroupEvent::kJoined, .joined = CountJoined()});
    } else if (!ending_) {
      seat.standing.lost = true;
      seat.standing.lost_at = Clock::now();
      JudgeNow();
    }
    CheckEnded();
    end = failure_;
  }
  Deliver();
  return end;
}

}  // namespace gradwire
