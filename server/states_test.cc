// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "base/error.h"
#include "server/job_state.h"
#include "server/op_queue.h"

namespace gradwire {
namespace {

constexpr Clock::time_point kNow{std::chrono::hours(1)};

OperationPtr Op(int64_t seq, const std::string& digest = "d",
                int64_t bytes = 10) {
  auto op = std::make_shared<Operation>();
  op->seq = seq;
  op->digest = digest;
  op->bytes = bytes;
  return op;
}

std::string Reason(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : std::string(status.message());
}

TEST(OpQueueTest, RunsInOrderWhateverTheOrderOfArrival) {
  std::vector<int64_t> order(50);
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i) + 1;
  std::mt19937 random(1);
  for (int round = 0; round < 20; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    OpQueue queue({});
    std::vector<int64_t> ran;
    for (int64_t seq : order) {
      ASSERT_TRUE(queue.Submit(Op(seq), kNow).ok());
      while (OperationPtr op = queue.TakeNext()) ran.push_back(op->seq);
    }
    ASSERT_TRUE(std::is_sorted(ran.begin(), ran.end()));
    ASSERT_EQ(ran.size(), order.size());
    EXPECT_EQ(queue.queued_bytes(), 0);
  }
}

TEST(OpQueueTest, ARepetitionIsTheFirstOperation) {
  OpQueue queue({});
  OperationPtr first = *queue.Submit(Op(1, "a"), kNow);
  EXPECT_EQ(*queue.Submit(Op(1, "a"), kNow), first);
  EXPECT_EQ(Reason(queue.Submit(Op(1, "b"), kNow).status()), "SEQ_REUSED");
  EXPECT_EQ(queue.TakeNext(), first);
  EXPECT_EQ(*queue.Submit(Op(1, "a"), kNow), first) << "also after it ran";
  EXPECT_EQ(queue.TakeNext(), nullptr);
  EXPECT_EQ(Reason(queue.Submit(Op(0), kNow).status()), "SEQ_INVALID");
}

TEST(OpQueueTest, AFullQueueAdmitsWhatFillsTheGap) {
  OpQueue::Limits limits;
  limits.max_ops = 3;
  OpQueue queue(limits);
  for (int64_t seq : {2, 3, 4}) {
    ASSERT_TRUE(queue.Submit(Op(seq), kNow).ok());
  }
  EXPECT_EQ(Reason(queue.Submit(Op(5), kNow).status()), "QUEUE_FULL");
  EXPECT_TRUE(queue.Submit(Op(1), kNow).ok());
  for (int64_t seq = 1; seq <= 4; ++seq) EXPECT_EQ(queue.TakeNext()->seq, seq);
  EXPECT_TRUE(queue.Submit(Op(5), kNow).ok());
}

TEST(OpQueueTest, BytesAreBoundedToo) {
  OpQueue::Limits limits;
  limits.max_bytes = 25;
  OpQueue queue(limits);
  ASSERT_TRUE(queue.Submit(Op(2), kNow).ok());
  ASSERT_TRUE(queue.Submit(Op(3), kNow).ok());
  EXPECT_EQ(Reason(queue.Submit(Op(4), kNow).status()), "QUEUE_FULL");
}

TEST(OpQueueTest, AGapTimesOutAndTheHandleGoesOn) {
  OpQueue::Limits limits;
  limits.gap_timeout = std::chrono::seconds(5);
  OpQueue queue(limits);
  ASSERT_TRUE(queue.Submit(Op(1), kNow).ok());
  EXPECT_TRUE(queue.ExpireGap(kNow + std::chrono::hours(1)).empty())
      << "1 only waits for its turn";
  queue.TakeNext();
  ASSERT_TRUE(queue.Submit(Op(3), kNow).ok());
  ASSERT_TRUE(queue.Submit(Op(5), kNow + std::chrono::seconds(4)).ok());
  EXPECT_TRUE(queue.ExpireGap(kNow + std::chrono::seconds(8)).empty())
      << "an arrival restarts the wait";
  const auto expired = queue.ExpireGap(kNow + std::chrono::seconds(9));
  ASSERT_EQ(expired.size(), 2u);
  for (int64_t late : {2, 4}) {
    EXPECT_EQ(Reason(queue.Submit(Op(late), kNow).status()), "SEQUENCE_CLOSED");
  }
  ASSERT_TRUE(queue.Submit(Op(6), kNow).ok());
  EXPECT_EQ(queue.TakeNext()->seq, 6);
}

TEST(OpQueueTest, NumbersFarAheadTakeNoTime) {
  OpQueue::Limits limits;
  limits.gap_timeout = std::chrono::seconds(5);
  OpQueue queue(limits);
  for (const int64_t seq : {int64_t{1}, int64_t{3}, OpQueue::kMaxSeq - 1}) {
    ASSERT_TRUE(queue.Submit(Op(seq), kNow).ok());
  }
  EXPECT_EQ(Reason(queue.Submit(Op(OpQueue::kMaxSeq + 1), kNow).status()),
            "SEQ_INVALID");
  EXPECT_EQ(Reason(queue.Submit(Op(INT64_MAX), kNow).status()), "SEQ_INVALID");
  const auto all = [](const Operation&) { return true; };
  EXPECT_EQ(queue.PassThrough(0, all), 1) << "2 is to come";
  queue.TakeNext();
  EXPECT_EQ(queue.PassThrough(0, all), 1);
  EXPECT_EQ(queue.PassThrough(1, all), 1);
  ASSERT_EQ(queue.ExpireGap(kNow + std::chrono::seconds(5)).size(), 2u);
  EXPECT_EQ(queue.next_seq(), OpQueue::kMaxSeq);
  EXPECT_EQ(queue.PassThrough(0, all), OpQueue::kMaxSeq - 1);
  const auto but_3 = [](const Operation& op) { return op.seq != 3; };
  EXPECT_EQ(queue.PassThrough(0, but_3), 2);
  EXPECT_EQ(queue.PassThrough(3, but_3), OpQueue::kMaxSeq - 1);
  EXPECT_EQ(queue.PassThrough(0, [](const Operation&) { return false; }), 0);
  ASSERT_TRUE(queue.Submit(Op(OpQueue::kMaxSeq), kNow).ok());
  EXPECT_EQ(queue.TakeNext()->seq, OpQueue::kMaxSeq);
}

TEST(OpQueueTest, WhatIsBeingLoggedWaits) {
  OpQueue queue({});
  OperationPtr op = Op(1);
  op->logging = true;
  ASSERT_TRUE(queue.Submit(op, kNow).ok());
  EXPECT_EQ(queue.TakeNext(), nullptr);
  op->logging = false;
  EXPECT_EQ(queue.TakeNext(), op);
}

TEST(OpQueueTest, WhatCouldNotBeLoggedLeavesItsNumberOpen) {
  OpQueue queue({});
  OperationPtr op = Op(1);
  ASSERT_TRUE(queue.Submit(op, kNow).ok());
  queue.Withdraw(op);
  EXPECT_EQ(queue.Find(1), nullptr);
  EXPECT_EQ(queue.queued_bytes(), 0);
  EXPECT_TRUE(queue.Submit(Op(1, "another"), kNow).ok());
  queue.Withdraw(op);
  EXPECT_NE(queue.Find(1), nullptr) << "it was not its own";
}

TEST(OpQueueTest, AnEarlierProcesssOperationsAreTaken) {
  OpQueue queue({});
  for (int64_t seq : {5, 1, 2, 7}) {
    OperationPtr op = Op(seq);
    // 1 and 2 were run, 5 and 7 were drained, what lies between never came.
    op->final_state = v1::OPERATION_STATE_DONE;
    queue.Restore(op, kNow);
  }
  queue.Restore(Op(8), kNow);
  // This one was drained as well, and its end not recorded.
  queue.Restore(Op(4), kNow);
  EXPECT_EQ(queue.next_seq(), 3);
  const auto closed = queue.CloseBelow(8);
  ASSERT_EQ(closed.size(), 1u);
  EXPECT_EQ(closed[0]->seq, 4);
  EXPECT_EQ(queue.queued(), 1);
  EXPECT_EQ(queue.next_seq(), 8);
  EXPECT_EQ(Reason(queue.Submit(Op(6), kNow).status()), "SEQUENCE_CLOSED");
  EXPECT_EQ((*queue.Submit(Op(2), kNow))->seq, 2) << "a repetition";
  EXPECT_EQ(Reason(queue.Submit(Op(2, "b"), kNow).status()), "SEQ_REUSED");
  EXPECT_EQ(queue.TakeNext()->seq, 8);
  EXPECT_EQ(queue.TakeNext(), nullptr);
}

TEST(OpQueueTest, AHeldNumberDoesNotTimeOut) {
  OpQueue::Limits limits;
  limits.gap_timeout = std::chrono::seconds(5);
  OpQueue queue(limits);
  queue.Hold(1);
  ASSERT_TRUE(queue.Submit(Op(2), kNow).ok());
  EXPECT_TRUE(queue.ExpireGap(kNow + std::chrono::hours(1)).empty());
  queue.Unhold(1, kNow + std::chrono::hours(1));
  EXPECT_TRUE(queue.ExpireGap(kNow + std::chrono::hours(1)).empty());
  EXPECT_EQ(queue.ExpireGap(kNow + std::chrono::hours(2)).size(), 1u);
}

TEST(OpQueueTest, CancelledAndClosedNumbersCountAsExecuted) {
  OpQueue queue({});
  OperationPtr second = *queue.Submit(Op(2), kNow);
  ASSERT_TRUE(queue.Submit(Op(4), kNow).ok());
  EXPECT_TRUE(queue.Cancel(second));
  EXPECT_FALSE(queue.Cancel(second));
  queue.Close(Op(3));
  ASSERT_TRUE(queue.Submit(Op(1), kNow).ok());
  EXPECT_EQ(queue.TakeNext()->seq, 1);
  EXPECT_EQ(queue.TakeNext()->seq, 4);
  EXPECT_EQ(queue.next_seq(), 5);
  EXPECT_EQ(*queue.Submit(Op(2), kNow), second);
}

TEST(OpQueueTest, PositionsAndGapsAreSeen) {
  OpQueue queue({});
  OperationPtr third = *queue.Submit(Op(3), kNow);
  EXPECT_TRUE(queue.BlockedOnGap(third));
  ASSERT_TRUE(queue.Submit(Op(1), kNow).ok());
  EXPECT_TRUE(queue.BlockedOnGap(third)) << "2 is still missing";
  ASSERT_TRUE(queue.Submit(Op(2), kNow).ok());
  EXPECT_FALSE(queue.BlockedOnGap(third));
  EXPECT_EQ(queue.Position(third), 2);
}

using Actions = std::vector<JobAction>;

v1::Job Running() {
  v1::Job job;
  StartJob(job);
  Decide({JobEvent::kStarted}, job);
  Decide({JobEvent::kReady}, job);
  return job;
}

absl::Status Exit() {
  return ErrorBuilder(absl::StatusCode::kAborted, "RANK_EXITED")
      .Server()
      .With("signal", 9)
      .Message("gone");
}

TEST(DecideTest, AJobStartsLoadsAndIsReady) {
  v1::Job job;
  StartJob(job);
  EXPECT_EQ(job.state(), v1::JOB_STATE_CREATING);
  Decide({JobEvent::kStarted}, job);
  EXPECT_EQ(job.state(), v1::JOB_STATE_PENDING);
  Decide({JobEvent::kProgress, v1::JOB_PHASE_LOADING, 0.5}, job);
  EXPECT_EQ(job.state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(job.progress(), 0.5);
  EXPECT_FALSE(job.ready());
  Decide({JobEvent::kReady}, job);
  EXPECT_TRUE(job.ready());
  EXPECT_EQ(job.phase(), v1::JOB_PHASE_READY);
}

TEST(DecideTest, AJobWaitsForItsRanks) {
  v1::Job job;
  StartJob(job);
  Decide({JobEvent::kStarted}, job);
  JobEvent joined{JobEvent::kRanksJoined};
  joined.world_size = 3;
  for (const int count : {1, 2, 1}) {
    joined.joined = count;
    Decide(joined, job);
    EXPECT_EQ(job.state(), v1::JOB_STATE_PENDING);
    EXPECT_EQ(job.status_reason(), "RANKS_MISSING");
    EXPECT_EQ(job.status_message(),
              std::to_string(count) + " of 3 ranks have come.");
  }
  joined.joined = 3;
  Decide(joined, job);
  EXPECT_EQ(job.state(), v1::JOB_STATE_PENDING);
  EXPECT_EQ(job.status_reason(), "");
  EXPECT_EQ(job.status_message(), "");
}

TEST(DecideTest, ADeadRankFailsTheJobOnce) {
  v1::Job job = Running();
  const JobEvent exit{JobEvent::kRanksFailed, {}, 0, Exit()};
  EXPECT_EQ(Decide(exit, job),
            (Actions{JobAction::kFailOperations, JobAction::kStopRanks}));
  EXPECT_EQ(job.state(), v1::JOB_STATE_FAILED);
  EXPECT_EQ(job.status_reason(), "RANK_EXITED");
  EXPECT_EQ(job.error().metadata().at("signal"), "9");
  EXPECT_FALSE(job.ready());
  EXPECT_TRUE(Decide({JobEvent::kReady}, job).empty());
  EXPECT_FALSE(job.ready()) << "a late event changes nothing";
}

TEST(DecideTest, ARefusedModelKeepsItsReason) {
  v1::Job job;
  StartJob(job);
  const absl::Status refused =
      ErrorBuilder(absl::StatusCode::kUnimplemented, "MODEL_UNSUPPORTED")
          .Message("no");
  Decide({JobEvent::kRanksFailed, {}, 0, refused}, job);
  Decide({JobEvent::kRanksFailed, {}, 0, Exit()}, job);
  EXPECT_EQ(job.status_reason(), "MODEL_UNSUPPORTED");
}

TEST(DecideTest, AFailedJobCanBeRestarted) {
  v1::Job job = Running();
  Decide({JobEvent::kRestart}, job);
  EXPECT_TRUE(job.ready()) << "only a failed one";
  job.set_weight_version(3);
  job.set_optimizer_step(3);
  Decide({JobEvent::kRanksFailed, {}, 0, Exit()}, job);
  EXPECT_TRUE(Decide({JobEvent::kRestart}, job).empty());
  EXPECT_EQ(job.state(), v1::JOB_STATE_CREATING);
  EXPECT_FALSE(job.has_error());
  EXPECT_EQ(job.optimizer_step(), 3) << "it comes back";
  EXPECT_EQ(job.status_reason(), "RESTARTED");
  Decide({JobEvent::kStarted}, job);
  Decide({JobEvent::kReady}, job);
  EXPECT_TRUE(job.ready());
  EXPECT_EQ(job.status_reason(), "RESTARTED") << "there is nothing older";
}

TEST(DecideTest, ADeadRankThatMayComeBackIsARecovery) {
  v1::Job job = Running();
  const JobEvent lost{JobEvent::kRecovering, {}, 0, Exit()};
  EXPECT_EQ(Decide(lost, job), (Actions{JobAction::kStopRanks}))
      << "operations wait";
  EXPECT_EQ(job.state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(job.phase(), v1::JOB_PHASE_RECOVERING);
  EXPECT_FALSE(job.ready());
  EXPECT_EQ(job.status_reason(), "RANK_EXITED");
  EXPECT_FALSE(job.has_error());
  EXPECT_EQ(Decide(lost, job), (Actions{JobAction::kStopRanks})) << "again";
  Decide({JobEvent::kProgress, v1::JOB_PHASE_RECOVERING, 0.5}, job);
  EXPECT_EQ(job.progress(), 0.5);
  Decide({JobEvent::kReady}, job);
  EXPECT_TRUE(job.ready());
  EXPECT_EQ(job.status_reason(), "") << "it is over";
  Decide({JobEvent::kDelete}, job);
  EXPECT_TRUE(Decide(lost, job).empty());
  EXPECT_EQ(job.state(), v1::JOB_STATE_DELETING);
}

TEST(DecideTest, DeletionEndsEverythingOnce) {
  v1::Job job = Running();
  EXPECT_EQ(Decide({JobEvent::kDelete}, job),
            (Actions{JobAction::kFailOperations, JobAction::kStopRanks}));
  EXPECT_EQ(job.state(), v1::JOB_STATE_DELETING);
  EXPECT_TRUE(Decide({JobEvent::kRanksFailed, {}, 0, Exit()}, job).empty());
  EXPECT_TRUE(Decide({JobEvent::kDelete}, job).empty());
  Decide({JobEvent::kStopped}, job);
  EXPECT_EQ(job.state(), v1::JOB_STATE_DELETED);
}

}  // namespace
}  // namespace gradwire
