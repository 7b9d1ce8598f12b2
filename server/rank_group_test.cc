// SPDX-License-Identifier: Apache-2.0
// A group whose ranks are threads of the test: what it tells its job, and that
// it ends, whatever they do at once.
#include "server/rank_group.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <thread>

#include "absl/synchronization/notification.h"
#include "base/error.h"
#include "server/version.h"

namespace gradwire {
namespace {

constexpr char kToken[] = "secret";
constexpr absl::Duration kLong = absl::Seconds(30);

std::string Reason(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : std::string(status.message());
}

class FakeStream : public RankStream {
 public:
  bool Write(const v1::RankCommand& command) override {
    absl::MutexLock lock(&mu_);
    ++writes_;
    last_ = command;
    while (blocks_ && !cancelled_) changed_.Wait(&mu_);
    return !cancelled_;
  }
  void Cancel() override {
    absl::MutexLock lock(&mu_);
    cancelled_ = true;
    changed_.SignalAll();
  }
  void Block() {
    absl::MutexLock lock(&mu_);
    blocks_ = true;
  }
  bool AwaitCancel() {
    const absl::Time deadline = absl::Now() + kLong;
    absl::MutexLock lock(&mu_);
    while (!cancelled_) {
      if (changed_.WaitWithDeadline(&mu_, deadline)) return false;
    }
    return true;
  }
  v1::RankCommand last() {
    absl::MutexLock lock(&mu_);
    return last_;
  }

 private:
  absl::Mutex mu_;
  absl::CondVar changed_;
  bool blocks_ = false, cancelled_ = false;
  int writes_ = 0;
  v1::RankCommand last_;
};

// What a job would see.
class Events {
 public:
  void Add(GroupEvent event) {
    absl::MutexLock lock(&mu_);
    events_.push_back(std::move(event));
    changed_.SignalAll();
  }
  bool Await(GroupEvent::Kind kind) {
    const absl::Time deadline = absl::Now() + kLong;
    absl::MutexLock lock(&mu_);
    while (Count(kind) == 0) {
      if (changed_.WaitWithDeadline(&mu_, deadline)) return false;
    }
    return true;
  }
  int64_t Count(GroupEvent::Kind kind) const {
    return std::count_if(events_.begin(), events_.end(),
                         [&](const auto& event) { return event.kind == kind; });
  }
  // After kEnded.
  const std::vector<GroupEvent>& all() const { return events_; }

 private:
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::vector<GroupEvent> events_;
};

class RankGroupTest : public testing::Test {
 protected:
  RankGroup& Make(int world, absl::Duration timeout = kLong) {
    RankGroupOptions options;
    options.job_id = "job";
    options.world_size = world;
    options.join_token = kToken;
    options.rank_timeout = timeout;
    options.metrics = &metrics_;
    streams_ = std::vector<FakeStream>(static_cast<size_t>(world));
    group_ = std::make_unique<RankGroup>(
        options, [this](GroupEvent event) { events_.Add(std::move(event)); });
    group_->Start();
    return *group_;
  }
  absl::Status Join(int rank) {
    v1::RankHello hello;
    hello.set_rank(rank);
    hello.set_world_size(static_cast<int>(streams_.size()));
    hello.set_version(kVersion);
    hello.set_join_token(kToken);
    return group_->Join(hello, &streams_[static_cast<size_t>(rank)]);
  }
  void JoinAll() {
    for (int rank = 0; rank < static_cast<int>(streams_.size()); ++rank) {
      ASSERT_TRUE(Join(rank).ok());
    }
  }

  Metrics metrics_;
  Events events_;
  std::vector<FakeStream> streams_;
  std::unique_ptr<RankGroup> group_;
};

v1::RankEvent Heartbeat() {
  v1::RankEvent event;
  event.mutable_heartbeat();
  return event;
}

TEST_F(RankGroupTest, AGroupWithoutRanksEndsAtOnce) {
  Make(2).Stop();
  EXPECT_TRUE(events_.Await(GroupEvent::kEnded));
  EXPECT_EQ(Reason(Join(0)), "RANK_GROUP_ENDED");
}

TEST_F(RankGroupTest, ARankThatGoesBeforeTheWorldIsCompleteIsReplaced) {
  RankGroup& group = Make(2);
  ASSERT_TRUE(Join(1).ok());
  EXPECT_EQ(streams_[1].last().joined().joined(), 1);
  EXPECT_EQ(Reason(Join(1)), "RANK_DUPLICATE");
  EXPECT_TRUE(group.Leave(1).ok());
  JoinAll();
  EXPECT_EQ(Reason(Join(0)), "RANK_LATE");
  EXPECT_EQ(Reason(group.Leave(0)), "RANK_LOST");
  EXPECT_FALSE(group.OnEvent(1, Heartbeat()));
  EXPECT_EQ(Reason(group.Leave(1)), "RANK_LOST");
  EXPECT_TRUE(events_.Await(GroupEvent::kEnded));
  std::vector<int> joined;
  for (const GroupEvent& event : events_.all()) {
    if (event.kind == GroupEvent::kJoined) joined.push_back(event.joined);
  }
  EXPECT_EQ(joined, (std::vector<int>{0, 1, 0, 1, 2}));
  EXPECT_EQ(events_.all().back().kind, GroupEvent::kEnded);
}

// Ranks report from threads of their own, each at its pace; the job sees the
// datums of every command in order, and then its end.
TEST_F(RankGroupTest, EventsComeInOrderWhateverRanksDoAtOnce) {
  constexpr int kWorld = 4, kCommands = 20, kDatums = 40;
  RankGroup& group = Make(kWorld);
  JoinAll();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kWorld; ++rank) {
    ranks.emplace_back([&, rank] {
      std::mt19937 random(static_cast<unsigned>(rank));
      for (int id = 1; id <= kCommands; ++id) {
        for (int i = rank; i < kDatums; i += kWorld) {
          v1::RankEvent event;
          event.mutable_logprobs()->set_command_id(id);
          event.mutable_logprobs()
              ->mutable_chunk()
              ->add_items()
              ->set_datum_index(i);
          group.OnEvent(rank, event);
          if (random() % 4 == 0) std::this_thread::yield();
        }
        v1::RankEvent event;
        event.mutable_done()->set_command_id(id);
        event.mutable_done()->mutable_forward()->set_datum_count(kDatums);
        group.OnEvent(rank, event);
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  group.Stop();
  for (int rank = 0; rank < kWorld; ++rank) {
    EXPECT_TRUE(group.Leave(rank).ok());
  }
  ASSERT_TRUE(events_.Await(GroupEvent::kEnded));
  std::map<int64_t, int64_t> next;
  int64_t done = 0;
  for (const GroupEvent& event : events_.all()) {
    for (const v1::LogprobItem& item : event.logprobs) {
      ASSERT_EQ(item.datum_index(), next[event.command_id]++);
    }
    if (event.kind != GroupEvent::kDone) continue;
    ASSERT_EQ(event.done.command_id(), ++done);
    ASSERT_EQ(next[done], kDatums);
  }
  EXPECT_EQ(done, kCommands);
}

TEST_F(RankGroupTest, AWriteThatBlocksDoesNotOutliveTheGroup) {
  RankGroup& group = Make(2);
  JoinAll();
  streams_[0].Block();
  std::thread executor([&] {
    Dispatch dispatch;
    dispatch.own.resize(2);
    dispatch.command.mutable_reset();
    group.Send(dispatch);
  });
  group.Stop();
  // The rank does not see the end by itself, and is cut off.
  EXPECT_TRUE(streams_[0].AwaitCancel());
  executor.join();
  EXPECT_TRUE(group.Leave(0).ok());
  EXPECT_FALSE(group.OnEvent(1, Heartbeat()));
  EXPECT_TRUE(group.Leave(1).ok());
  EXPECT_TRUE(events_.Await(GroupEvent::kEnded));
}

TEST_F(RankGroupTest, ASilentRankIsHungOnceTheWorldIsComplete) {
  RankGroup& group = Make(2, absl::Milliseconds(300));
  ASSERT_TRUE(Join(0).ok());
  EXPECT_TRUE(streams_[0].AwaitCancel()) << "it may be replaced";
  EXPECT_TRUE(group.Leave(0).ok());
  JoinAll();
  EXPECT_TRUE(events_.Await(GroupEvent::kFailed));
  for (int rank : {0, 1}) {
    EXPECT_EQ(Reason(group.Leave(rank)), "RANK_HUNG");
  }
  EXPECT_TRUE(events_.Await(GroupEvent::kEnded));
}

TEST_F(RankGroupTest, FailuresAndEndsAreToldOnce) {
  for (int round = 0; round < 20; ++round) {
    RankGroup& group = Make(3);
    JoinAll();
    std::vector<std::thread> ends;
    for (int rank = 0; rank < 3; ++rank) {
      ends.emplace_back([&, rank] { group.Leave(rank).IgnoreError(); });
    }
    ends.emplace_back([&] { group.Stop(); });
    for (std::thread& end : ends) end.join();
    group_.reset();
    EXPECT_LE(events_.Count(GroupEvent::kFailed), round + 1);
    EXPECT_EQ(events_.Count(GroupEvent::kEnded), round + 1);
  }
}

}  // namespace
}  // namespace gradwire
