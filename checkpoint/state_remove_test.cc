// SPDX-License-Identifier: Apache-2.0
// A checkpoint is deleted, and that is interrupted in every way: it is whole,
// or gone.
#include <gtest/gtest.h>

#include "checkpoint/crash_file_system.h"
#include "checkpoint/state_testing.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

using Fault = CrashFileSystem::Fault;
using Lie = CrashFileSystem::Lie;

class StateRemoveTest : public testing::Test {
 protected:
  StateRemoveTest() {
    CrashFileSystem files({.files = {}, .directories = {"/s"}});
    EXPECT_TRUE(
        Save(files, "/s/kept", kept_, DealPieces(kept_, 2, 1), 64).ok());
    EXPECT_TRUE(
        Save(files, "/s/gone", gone_, DealPieces(gone_, 3, 2), 64).ok());
    start_ = files.Latest();
  }

  // What is wrong on a disk; "" if nothing. `promised`: RemoveState has said
  // OK.
  std::string Check(const DiskImage& image, bool promised) const {
    CrashFileSystem files(image);
    absl::Status status;
    std::string wrong = Compare(files, "/s/kept", kept_, &status);
    if (!wrong.empty()) return "kept " + wrong;
    wrong = Compare(files, "/s/gone", gone_, &status);
    if (wrong.empty()) return promised ? "it is still there" : "";
    return ReasonOf(status) == "CHECKPOINT_NOT_FOUND" ? "" : "gone " + wrong;
  }

  std::string AfterPowerLoss(const CrashFileSystem& files, int64_t event,
                             bool promised) const {
    std::string violation;
    files.ForEachPowerLoss(event, 50, static_cast<uint64_t>(event),
                           [&](const DiskImage& image) {
                             if (!violation.empty()) return;
                             violation = Check(image, promised);
                           });
    return violation;
  }

  const TestState kept_ = MakeState(19, 1, std::nullopt);
  const TestState gone_ = MakeState(29, 2, DType::kBF16);
  DiskImage start_;
};

TEST_F(StateRemoveTest, TheNameIsFree) {
  CrashFileSystem files(start_);
  EXPECT_TRUE(RemoveState(files, "/s/gone").ok());
  EXPECT_EQ(files.List("/s").value(), std::vector<std::string>{"kept"});
  EXPECT_EQ(ReasonOf(RemoveState(files, "/s/gone")), "CHECKPOINT_NOT_FOUND");
  EXPECT_EQ(ReasonOf(RemoveState(files, "/nowhere/gone")),
            "CHECKPOINT_NOT_FOUND");
  EXPECT_TRUE(Save(files, "/s/gone", kept_, DealPieces(kept_, 1, 3), 64).ok());
  absl::Status status;
  EXPECT_EQ(Compare(files, "/s/gone", kept_, &status), "");
}

TEST_F(StateRemoveTest, ADamagedOneGoesAsWell) {
  DiskImage image = start_;
  image.files["/s/gone/manifest.json"] = "{";
  image.files.erase("/s/gone/rank-00001.data");
  image.files["/s/gone/of somebody else"] = "";
  CrashFileSystem files(image);
  EXPECT_TRUE(RemoveState(files, "/s/gone").ok());
  EXPECT_EQ(files.List("/s").value(), std::vector<std::string>{"kept"});
}

TEST_F(StateRemoveTest, WhoReadsItGoesOn) {
  CrashFileSystem files(start_);
  auto reader = StateReader::Open(files, "/s/gone");
  ASSERT_TRUE(reader.ok());
  ASSERT_TRUE((*reader)->Verify("weight", 0, 29).ok());
  ASSERT_TRUE(RemoveState(files, "/s/gone").ok());
  std::string read(29 * 4, '\0');
  EXPECT_TRUE((*reader)->Read("weight", 0, 29, read.data()).ok());
  EXPECT_EQ(read, gone_.bytes.at("weight"));
}

TEST_F(StateRemoveTest, ThePowerFailsAtAnyTime) {
  CrashFileSystem files(start_);
  ASSERT_TRUE(RemoveState(files, "/s/gone").ok());
  const int64_t end = files.num_events();
  for (int64_t event = 0; event <= end; ++event) {
    ASSERT_EQ(AfterPowerLoss(files, event, event == end), "") << event;
  }
  // Without its sync, the checkpoint may come back.
  bool caught = false;
  CrashFileSystem lying(start_);
  lying.TellLie(Lie::kSyncDirectory);
  ASSERT_TRUE(RemoveState(lying, "/s/gone").ok());
  caught = !AfterPowerLoss(lying, lying.num_events(), true).empty();
  EXPECT_TRUE(caught);
}

TEST_F(StateRemoveTest, OnlyIfItHolds) {
  CrashFileSystem files(start_);
  // It is asked where it lies by then.
  const auto remove = [&](bool holds) {
    return RemoveStateIf(files, "/s/gone", [&](const std::string& directory) {
      EXPECT_FALSE(files.Stat("/s/gone").ok());
      EXPECT_TRUE(ReadStateHeader(files, directory).ok());
      return holds;
    });
  };
  EXPECT_EQ(remove(false).value(), false);
  EXPECT_EQ(files.Latest(), start_);
  EXPECT_EQ(remove(true).value(), true);
  EXPECT_EQ(files.List("/s").value(), std::vector<std::string>{"kept"});
  EXPECT_EQ(ReasonOf(remove(true).status()), "CHECKPOINT_NOT_FOUND");
}

// Another one takes the name while it is asked.
TEST_F(StateRemoveTest, WhatComesMeanwhileStays) {
  for (const bool holds : {false, true}) {
    CrashFileSystem files(start_);
    const auto come = [&](const std::string&) {
      EXPECT_TRUE(
          Save(files, "/s/come", kept_, DealPieces(kept_, 1, 3), 64).ok());
      EXPECT_TRUE(files.Rename("/s/come", "/s/gone").ok());
      return holds;
    };
    EXPECT_EQ(RemoveStateIf(files, "/s/gone", come).value(), holds);
    absl::Status status;
    EXPECT_EQ(Compare(files, "/s/gone", kept_, &status), "");
    EXPECT_EQ(files.List("/s").value(),
              (std::vector<std::string>{"gone", "kept"}));
  }
}

TEST_F(StateRemoveTest, AnyCallFailsWhereItIsAsked) {
  int64_t faults = 0;
  for (const Fault fault : {Fault::kKill, Fault::kIoError}) {
    for (int64_t call = 1;; ++call) {
      CrashFileSystem files(start_);
      files.FailAt(call, fault);
      const auto removed =
          RemoveStateIf(files, "/s/gone", [](const auto&) { return false; });
      if (call > files.calls()) break;
      if (files.faults() == 0) continue;
      ++faults;
      const auto whole = [&](const DiskImage& image) -> std::string {
        CrashFileSystem next(image);
        EXPECT_TRUE(RemoveLeftovers(next, "/s").ok());
        absl::Status status;
        return Compare(next, "/s/gone", gone_, &status);
      };
      ASSERT_EQ(whole(files.Latest()), "") << call;
      files.ForEachPowerLoss(
          files.num_events(), 50, 1,
          [&](const DiskImage& image) { ASSERT_EQ(whole(image), ""); });
    }
  }
  EXPECT_GT(faults, 6);
}

TEST_F(StateRemoveTest, AnyCallFails) {
  int64_t faults = 0;
  for (const Fault fault : {Fault::kKill, Fault::kIoError}) {
    for (int64_t call = 1;; ++call) {
      CrashFileSystem files(start_);
      files.FailAt(call, fault);
      const bool removed = RemoveState(files, "/s/gone").ok();
      if (call > files.calls()) break;
      if (files.faults() == 0) continue;
      ++faults;
      ASSERT_FALSE(removed) << call;
      ASSERT_EQ(Check(files.Latest(), false), "") << call;
      for (int64_t event = 0; event <= files.num_events(); ++event) {
        ASSERT_EQ(AfterPowerLoss(files, event, false), "") << call;
      }
      // The next process leaves nothing hidden; the next try succeeds.
      files.Revive();
      ASSERT_TRUE(RemoveLeftovers(files, "/s").ok());
      const absl::Status again = RemoveState(files, "/s/gone");
      ASSERT_TRUE(again.ok() || absl::IsNotFound(again)) << again;
      ASSERT_EQ(files.List("/s").value(), std::vector<std::string>{"kept"});
    }
  }
  EXPECT_GT(faults, 10);
}

}  // namespace
}  // namespace gradwire
