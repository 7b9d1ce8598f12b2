// SPDX-License-Identifier: Apache-2.0
// That crash_test sees what it should: of a protocol with a step left out it
// says that it breaks the promise.
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/crash_file_system.h"
#include "server/oplog/crash_session.h"
#include "server/oplog/oplog.h"
#include "server/oplog/testing.h"

namespace gradwire {
namespace {

using Fault = CrashFileSystem::Fault;
using Lie = CrashFileSystem::Lie;

// Whether the session breaks a promise with a lie told at `call`.
bool IsCaught(Lie lie, int64_t call) {
  CrashFileSystem files({}, kPageBytes);
  files.TellLie(lie, call);
  CrashSession session(files);
  session.Run();
  int64_t disks = 0;
  return !AfterAnyPowerLoss(files, session, 60, &disks).empty();
}

// The calls of a session at which the lie leaves something undone.
std::vector<int64_t> CallsOf(Lie lie) {
  CrashFileSystem honest({}, kPageBytes);
  CrashSession(honest).Run();
  std::vector<int64_t> calls;
  for (int64_t call = 1; call <= honest.calls(); ++call) {
    CrashFileSystem files({}, kPageBytes);
    files.TellLie(lie, call);
    CrashSession(files).Run();
    if (files.num_events() < honest.num_events()) calls.push_back(call);
  }
  return calls;
}

TEST(OplogSeededBugTest, EverySyncOfAFileIsNeeded) {
  EXPECT_TRUE(IsCaught(Lie::kSync, 0));
  const std::vector<int64_t> calls = CallsOf(Lie::kSync);
  EXPECT_GT(calls.size(), 15u);
  for (const int64_t call : calls) {
    EXPECT_TRUE(IsCaught(Lie::kSync, call)) << call;
  }
}

TEST(OplogSeededBugTest, EverySyncOfAChangedDirectoryIsNeeded) {
  EXPECT_TRUE(IsCaught(Lie::kSyncDirectory, 0));
  int64_t caught = 0, missed = 0;
  for (const int64_t call : CallsOf(Lie::kSyncDirectory)) {
    ++(IsCaught(Lie::kSyncDirectory, call) ? caught : missed);
  }
  EXPECT_GT(caught, 10);
  // The first opening syncs an empty directory, the second one that and the
  // parent though there is no change: see below. And the last segment that was
  // trimmed may as well come back.
  EXPECT_EQ(missed, 4);
}

// Of what an earlier process has left half done.
TEST(OplogSeededBugTest, TheSyncsOfAnOpeningAreNeeded) {
  // It died between the creation of the directory and the sync of the parent;
  // or left a segment without a header.
  CrashFileSystem killed({}, kPageBytes);
  killed.FailAt(3, Fault::kKill);
  ASSERT_FALSE(Oplog::Open(killed, kLogDirectory, SmallOptions(1)).ok());
  ASSERT_EQ(killed.Latest().directories.size(), 1u);
  const DiskImage torn = {
      .files = {{std::string(kLogDirectory) + "/" + SegmentName(1, 0), "GW"}},
      .directories = {kLogDirectory}};

  for (const bool directory_is_new : {true, false}) {
    bool honest_is_right = false;
    int64_t caught = 0;
    for (int64_t lie = 0; lie < 20; ++lie) {
      CrashFileSystem files(directory_is_new ? DiskImage() : torn, kPageBytes);
      if (directory_is_new) {
        files.FailAt(3, Fault::kKill);
        (void)Oplog::Open(files, kLogDirectory, SmallOptions(1));
        files.Revive();
      }
      // 0: none.
      if (lie > 0) files.TellLie(Lie::kSyncDirectory, files.calls() + lie);
      std::vector<Moment> moments = {Moment{}};
      const auto log = Oplog::Open(files, kLogDirectory, SmallOptions(2));
      ASSERT_TRUE(log.ok()) << log.status();
      Moment opened = {.event = files.num_events(),
                       .records = {},
                       .durable = (*log)->durable_offset()};
      bool violated = false;
      int64_t disks = 0;
      for (int64_t event = 0; event <= files.num_events(); ++event) {
        const Moment& moment = event < opened.event ? moments[0] : opened;
        violated = violated ||
                   !AfterPowerLoss(files, moment, event, 200, &disks).empty();
      }
      if (lie == 0) honest_is_right = !violated;
      if (lie > 0 && violated) ++caught;
    }
    EXPECT_TRUE(honest_is_right);
    // Of the parent, or of the removal; and of the new segment.
    EXPECT_EQ(caught, 2) << directory_is_new;
  }
}

TEST(OplogSeededBugTest, WhatAFailedSyncForgotMustBeWrittenAgain) {
  for (const Lie lie : {Lie::kNone, Lie::kRewrite}) {
    bool violated = false;
    for (int64_t call = 1; call < 120 && !violated; ++call) {
      CrashFileSystem files({}, kPageBytes);
      files.FailAt(call, Fault::kIoError);
      files.TellLie(lie);
      CrashSession session(files);
      session.Run();
      int64_t disks = 0;
      const int64_t end = files.num_events();
      for (int64_t event = end; event > 0 && !violated; event -= 7) {
        violated =
            !AfterPowerLoss(files, session.At(event), event, 4, &disks).empty();
      }
    }
    EXPECT_EQ(violated, lie == Lie::kRewrite);
  }
}

// A record that was refused half written, and the next with the same payload:
// without a sync between them, pages of both make the one that was refused.
TEST(OplogSeededBugTest, TheCutOfARefusedRecordMustBeSynced) {
  for (const bool honest : {true, false}) {
    CrashFileSystem files({}, 8);
    auto log = *Oplog::Open(files, kLogDirectory, SmallOptions(1, 4000));
    LogRecord refused = MakeRecord(1, 64), next = refused;
    next.seq_id = 2;
    files.FailAt(files.calls() + 1, Fault::kShortWrite);
    // The write, its rest, the truncation, the sync.
    if (!honest) files.TellLie(Lie::kSync, files.calls() + 4);
    ASSERT_EQ(ReasonOf(AppendTo(*log, 1, &refused)), "STORAGE_FULL");
    ASSERT_TRUE(AppendTo(*log, 1, &next).ok());
    const Moment moment = {.records = {next}, .durable = 72};
    int64_t disks = 0;
    EXPECT_EQ(
        AfterPowerLoss(files, moment, files.num_events(), 8000, &disks).empty(),
        honest);
  }
}

}  // namespace
}  // namespace gradwire
