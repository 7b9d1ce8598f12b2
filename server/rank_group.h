// SPDX-License-Identifier: Apache-2.0
// The ranks of one job, from their start to their end: processes, streams, and
// what they say, made one. A job that is restarted gets another group.
// docs/sharding.md.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "gradwire/v1/rank.pb.h"
#include "server/metrics.h"
#include "server/rank_collect.h"
#include "server/rank_process.h"
#include "server/rank_share.h"
#include "server/rank_verdict.h"

namespace gradwire {

// The supervisor's end of a rank's stream.
class RankStream {
 public:
  virtual ~RankStream() = default;
  // Blocks; one thread at a time. False: the stream is broken.
  virtual bool Write(const v1::RankCommand& command) = 0;
  // Breaks the stream; a Write that blocks returns. From any thread.
  virtual void Cancel() = 0;
};

struct RankGroupOptions {
  std::string job_id;
  int world_size = 1;
  // What a rank must know to join.
  std::string join_token;
  // Of each rank; empty: the ranks are started by somebody else.
  std::string rank_binary;
  // Where ranks that are started here dial: "unix:...".
  std::string rank_address;
  // Of a rank that is started here: "cpu", or "cuda", each its own GPU.
  std::string device = "cpu";
  // 0: an equal share of the CPUs.
  int threads = 0;
  // How long a rank may be silent.
  absl::Duration rank_timeout = absl::Seconds(30);
  Metrics* metrics = nullptr;
};

// What a group tells its job.
struct GroupEvent {
  enum Kind {
    kJoined,    // `joined` of the ranks are there
    kProgress,  // `progress`: rank 0's
    kChoices,   // `choices` of `rank`; before what they were used for
    kReady,     // all are; `ready` is rank 0's
    kLogprobs,  // `command_id`; `logprobs` are next in the order of datums
    kDone,      // all have answered `done`.command_id; `most_memory`,
                // `collectives`
    kFailed,    // `status` says why; the group is ending
    kEnded,     // no process and no stream is left; the last event
  };
  Kind kind;
  int joined = 0;
  int64_t command_id = 0;
  v1::RankProgress progress = {};
  int rank = 0;
  std::string choices = {};
  v1::RankReady ready = {};
  std::vector<v1::LogprobItem> logprobs = {};
  v1::RankDone done = {};
  v1::MemoryUse most_memory = {};
  v1::CollectiveUse collectives = {};
  absl::Status status = absl::OkStatus();
};

// Thread rule: all methods from any thread, without a lock that `on_event`
// takes.
class RankGroup {
 public:
  // `on_event` is called by one thread at a time, in order, with no lock held;
  // it may call back.
  RankGroup(RankGroupOptions options, std::function<void(GroupEvent)> on_event);
  // Ends what is left. REQUIRES: no stream is joined.
  ~RankGroup();
  RankGroup(const RankGroup&) = delete;

  // Starts the processes, if they are this group's to start. Failure: kFailed.
  void Start();
  // Kills processes, closes streams. kEnded follows, if it has not been there.
  void Stop();

  // Takes a rank's stream, which must live until Leave.
  // Errors: those of CheckToken and CheckHello; RANK_LATE, RANK_DUPLICATE,
  // RANK_GROUP_ENDED.
  absl::Status Join(const v1::RankHello& hello, RankStream* stream);
  // False: the stream is to end.
  bool OnEvent(int rank, v1::RankEvent event);
  // Gives the stream back; returns what it is to end with.
  absl::Status Leave(int rank);

  // Writes to all ranks, one after the other; returns when all is written, or
  // lost with its stream.
  void Send(const Dispatch& dispatch);

 private:
  // `write_mu` comes before mu_, under which all else is.
  struct Seat {
    absl::Mutex write_mu;
    RankStream* writer ABSL_GUARDED_BY(write_mu) = nullptr;
    RankStream* stream = nullptr;
    std::unique_ptr<RankProcess> process;
    RankStanding standing;
    bool ready = false;
    std::string kernels;  // once ready
  };

  bool local() const { return !options_.rank_binary.empty(); }
  Seat& seat(int rank) { return *seats_[static_cast<size_t>(rank)]; }
  void Write(int rank, const v1::RankCommand& command);
  void StartProcess(int rank);
  void OnExit(int rank, int wait_status);
  void Watch();

  absl::Status CheckSeat(const v1::RankHello& hello) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int CountJoined() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Nothing is lost yet with a rank that goes; another process may come.
  bool MayReplace() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !complete_ && !local();
  }
  void Report(int rank, absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnReady(int rank, v1::RankReady ready)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnLogprobs(v1::RankLogprobs logprobs) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnDone(int rank, v1::RankDone done) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Ends the group if it must end.
  void JudgeNow() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Fail(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void End() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CheckEnded() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Answers& AnswersTo(int64_t command_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Hands on what is in the outbox. Another thread that is at it sees to it.
  void Deliver() ABSL_LOCKS_EXCLUDED(mu_);

  const RankGroupOptions options_;
  const std::function<void(GroupEvent)> on_event_;
  std::vector<std::unique_ptr<Seat>> seats_;  // the vector stays as made

  absl::Mutex mu_;
  // All ranks were there once.
  bool complete_ ABSL_GUARDED_BY(mu_) = false;
  // No more ranks, no more answers.
  bool ending_ ABSL_GUARDED_BY(mu_) = false;
  Clock::time_point ending_since_ ABSL_GUARDED_BY(mu_);
  bool starting_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  // OK: somebody has asked for the end.
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  int num_processes_ ABSL_GUARDED_BY(mu_) = 0;
  v1::RankReady ready_ ABSL_GUARDED_BY(mu_);
  AddressExchange addresses_ ABSL_GUARDED_BY(mu_);
  std::map<int64_t, Answers> answers_ ABSL_GUARDED_BY(mu_);
  std::deque<GroupEvent> outbox_ ABSL_GUARDED_BY(mu_);
  bool delivering_ ABSL_GUARDED_BY(mu_) = false;
  absl::CondVar ended_changed_;

  std::thread watch_;
};

}  // namespace gradwire
