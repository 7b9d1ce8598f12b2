// SPDX-License-Identifier: Apache-2.0
// Who has lost its lease changes nothing: a server that was paused, and goes on
// after another one has taken its directory over.
#include "checkpoint/fence.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/state_testing.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

constexpr char kEpochs[] = "/epoch";

class FenceTest : public testing::Test {
 protected:
  FenceTest() {
    EXPECT_TRUE(RaiseEpoch(disk_, kEpochs, 5).ok());
    old_ = FencedFileSystem(disk_, kEpochs, 5);
  }
  void TakeOver() { ASSERT_TRUE(RaiseEpoch(disk_, kEpochs, 6).ok()); }
  bool IsThere(const std::string& path) { return disk_.Stat(path).ok(); }

  CrashFileSystem disk_;
  std::unique_ptr<FileSystem> old_;
};

TEST_F(FenceTest, EveryChangeOfANameIsRefused) {
  ASSERT_TRUE(old_->MakeDirectory("/d").ok());
  const auto file = *old_->Create("/d/file");
  ASSERT_TRUE(file->Append("before").ok());
  ASSERT_TRUE(old_->Create("/d/other").ok());
  TakeOver();
  const absl::Status fenced = old_->Rename("/d/file", "/d/new");
  EXPECT_EQ(ReasonOf(fenced), "EPOCH_FENCED");
  EXPECT_EQ(GetErrorDetail(fenced)->metadata.at("epoch"), "5");
  EXPECT_EQ(GetErrorDetail(fenced)->metadata.at("highest"), "6");
  EXPECT_EQ(ReasonOf(old_->Create("/d/x").status()), "EPOCH_FENCED");
  EXPECT_EQ(ReasonOf(old_->MakeDirectory("/e")), "EPOCH_FENCED");
  EXPECT_EQ(ReasonOf(old_->Remove("/d/file")), "EPOCH_FENCED");
  EXPECT_EQ(ReasonOf(old_->Link("/d/file", "/d/x").status()), "EPOCH_FENCED");
  EXPECT_EQ(ReasonOf(old_->Exchange("/d/file", "/d/other").status()),
            "EPOCH_FENCED");
  // It may look, and its successor may change.
  EXPECT_EQ(old_->List("/d")->size(), 2u);
  EXPECT_TRUE(old_->Open("/d/file", FileSystem::Access::kRead).ok());
  const auto successor = FencedFileSystem(disk_, kEpochs, 6);
  EXPECT_TRUE(successor->Rename("/d/file", "/d/new").ok());
}

TEST_F(FenceTest, ALowerEpochIsNotTaken) {
  TakeOver();
  EXPECT_EQ(ReasonOf(RaiseEpoch(disk_, kEpochs, 5)), "EPOCH_FENCED");
  EXPECT_EQ(ReasonOf(CheckEpoch(disk_, kEpochs, 5)), "EPOCH_FENCED");
  // The same one again, by a process that came back in the middle.
  EXPECT_TRUE(RaiseEpoch(disk_, kEpochs, 6).ok());
  EXPECT_TRUE(CheckEpoch(disk_, kEpochs, 6).ok());
  EXPECT_TRUE(CheckEpoch(disk_, "/nowhere", 1).ok());
  // What it has raised over, it removes.
  EXPECT_EQ(disk_.List(kEpochs)->size(), 1u);
}

TEST_F(FenceTest, ASaveThatWasBegunIsNotPublished) {
  const TestState state = MakeState(100, 1, DType::kF32);
  const std::vector<StatePiece> all = {
      {"weight", DType::kF32, 0, state.header.num_parameters}};
  ASSERT_TRUE(Save(*old_, "/there", state, {all}, 64).ok());
  StateHeader newer = state.header;
  newer.optimizer_step += 1;
  std::vector<PendingState> pending;
  for (const char* name : {"/absent", "/there"}) {
    pending.push_back(*PendingState::Create(*old_, name, /*replaces=*/true));
    ASSERT_TRUE(
        WriteRank(*old_, pending.back().path(), state, 0, all, 64).ok());
  }
  TakeOver();
  for (PendingState& each : pending) {
    EXPECT_EQ(ReasonOf(each.Publish(newer, 1).status()), "EPOCH_FENCED");
  }
  EXPECT_FALSE(IsThere("/absent"));
  EXPECT_EQ(ReadStateHeader(disk_, "/there")->optimizer_step,
            state.header.optimizer_step);
  EXPECT_EQ(ReasonOf(RemoveState(*old_, "/there")), "EPOCH_FENCED");
  EXPECT_EQ(ReasonOf(PendingState::Create(*old_, "/new").status()),
            "EPOCH_FENCED");
  EXPECT_EQ(ReadStateHeader(disk_, "/there")->optimizer_step,
            state.header.optimizer_step);
}

// Whatever a power loss leaves of a take-over, the epoch that has been answered
// for is the highest.
TEST_F(FenceTest, ATakeOverOutlastsAPowerLoss) {
  ASSERT_TRUE(RaiseEpoch(disk_, kEpochs, 6).ok());
  int64_t disks = disk_.ForEachPowerLoss(
      disk_.num_events(), 1000, 1, [](const DiskImage& image) {
        CrashFileSystem after(image);
        EXPECT_EQ(ReasonOf(CheckEpoch(after, kEpochs, 5)), "EPOCH_FENCED");
        EXPECT_TRUE(CheckEpoch(after, kEpochs, 6).ok());
      });
  EXPECT_GT(disks, 1);
}

}  // namespace
}  // namespace gradwire
