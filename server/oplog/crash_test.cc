// SPDX-License-Identifier: Apache-2.0
// A session with the log is interrupted in every way, and recovered.
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

constexpr Fault kFaults[] = {Fault::kKill, Fault::kNoSpace, Fault::kIoError,
                             Fault::kShortWrite};

TEST(OplogCrashTest, ThePowerFailsAtAnyTime) {
  for (const int64_t page_bytes : {16, 64, 512}) {
    SCOPED_TRACE(page_bytes);
    CrashFileSystem files({}, page_bytes);
    CrashSession session(files);
    session.Run();
    int64_t disks = 0;
    EXPECT_EQ(AfterAnyPowerLoss(files, session, 600, &disks), "");
    EXPECT_GT(disks, page_bytes == 16 ? 3000 : 250);
    RecordProperty("disks_" + std::to_string(page_bytes),
                   std::to_string(disks));
  }
}

// Every call fails in every way, and then the power.
TEST(OplogCrashTest, AnyCallFails) {
  int64_t faults = 0, disks = 0;
  for (const Fault fault : kFaults) {
    for (int64_t call = 1;; ++call) {
      SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)) +
                   " at call " + std::to_string(call));
      CrashFileSystem files({}, kPageBytes);
      files.FailAt(call, fault);
      CrashSession session(files);
      session.Run();
      ASSERT_EQ(session.violation(), "");
      if (call > files.calls()) break;
      if (files.faults() == 0) continue;
      ++faults;
      const int64_t end = files.num_events();
      std::mt19937 random(static_cast<uint32_t>(call));
      for (int i = 0; i < 6; ++i) {
        const int64_t event =
            i == 0 ? end : static_cast<int64_t>(random()) % (end + 1);
        ASSERT_EQ(AfterPowerLoss(files, session.At(event), event, 30, &disks),
                  "");
      }
      // By another process, and the power fails after that.
      Moment after = session.At(end);
      files.Revive();
      const int64_t watermark =
          call % 2 == 0 ? after.durable : after.not_needed;
      ASSERT_EQ(Recover(files, 600, watermark, &after), "");
      ASSERT_EQ(AfterPowerLoss(files, after, files.num_events(), 20, &disks),
                "");
    }
  }
  EXPECT_GT(faults, 200);
  EXPECT_GT(disks, 5000);
  RecordProperty("faults", std::to_string(faults));
  RecordProperty("disks", std::to_string(disks));
}

// Two calls fail, the second soon after the first: what was begun because of
// the first is interrupted by the second.
TEST(OplogCrashTest, AnyTwoCallsFail) {
  int64_t pairs = 0, disks = 0;
  std::mt19937 random(9);
  for (int i = 0; i < 800; ++i) {
    CrashFileSystem files({}, kPageBytes);
    const int64_t first = 1 + random() % 110, second = first + 1 + random() % 9;
    files.FailAt(first, kFaults[1 + random() % 3]);
    files.FailAt(second, kFaults[random() % 4]);
    SCOPED_TRACE(std::to_string(first) + " and " + std::to_string(second) +
                 ", draw " + std::to_string(i));
    CrashSession session(files);
    session.Run();
    ASSERT_EQ(session.violation(), "");
    if (files.faults() < 2) continue;
    ++pairs;
    const int64_t end = files.num_events();
    ASSERT_EQ(AfterPowerLoss(files, session.At(end), end, 8, &disks), "");
    Moment after = session.At(end);
    files.Revive();
    ASSERT_EQ(Recover(files, 600, after.durable, &after), "");
    ASSERT_EQ(AfterPowerLoss(files, after, files.num_events(), 8, &disks), "");
  }
  EXPECT_GT(pairs, 200);
  RecordProperty("pairs", std::to_string(pairs));
}

// Whatever is trimmed, the log knows how long it is: a segment of which nothing
// was synced may have to go, and must not be the only one.
TEST(OplogCrashTest, ATrimmedLogKeepsItsOffsets) {
  for (const bool appended : {false, true}) {
    CrashFileSystem files({}, kPageBytes);
    auto log =
        *Oplog::Open(files, kLogDirectory, SmallOptions(1, kSegmentBytes));
    LogRecord first = MakeRecord(1, 100), second = MakeRecord(2, 200);
    ASSERT_TRUE(AppendTo(*log, 1, &first).ok());
    // Seal, sync, create, header, sync, directory, and then the record.
    if (!appended) files.FailAt(files.calls() + 7, Fault::kShortWrite);
    EXPECT_EQ(AppendTo(*log, 1, &second).ok(), appended);
    ASSERT_EQ(files.List(kLogDirectory)->size(), 2u);
    const int64_t durable = log->durable_offset();
    ASSERT_TRUE(log->Trim(log->end()).ok());

    Moment moment = {
        .records = {first}, .durable = durable, .not_needed = durable};
    if (appended) moment.records.push_back(second);
    std::vector<DiskImage> images;
    files.ForEachPowerLoss(
        files.num_events(), 50, 1,
        [&](const DiskImage& image) { images.push_back(image); });
    for (const DiskImage& image : images) {
      for (int64_t call = 1; call < 25; ++call) {
        CrashFileSystem left(image, kPageBytes);
        left.FailAt(call, Fault::kKill);
        OplogOptions options = SmallOptions(2, kSegmentBytes);
        options.expected.watermark = options.expected.begin = durable;
        (void)Oplog::Open(left, kLogDirectory, options);
        int64_t disks = 0;
        ASSERT_EQ(AfterPowerLoss(left, moment, left.num_events(), 20, &disks),
                  "")
            << call;
      }
    }
  }
}

// Every call of the recovery fails in every way; then it is repeated, at once
// or after another power loss.
TEST(OplogCrashTest, RecoveryIsInterruptedAnywhere) {
  CrashFileSystem files({}, kPageBytes);
  CrashSession session(files);
  session.Run();
  int64_t faults = 0, disks = 0;
  std::mt19937 random(3);
  for (int i = 0; i < 24; ++i) {
    const int64_t event =
        i == 0 ? files.num_events()
               : static_cast<int64_t>(random()) % (files.num_events() + 1);
    const Moment& moment = session.At(event);
    std::vector<DiskImage> images;
    files.ForEachPowerLoss(event, 40, random(), [&](const DiskImage& image) {
      images.push_back(image);
    });
    const DiskImage& image = images[random() % images.size()];
    for (const Fault fault : kFaults) {
      for (int64_t call = 1;; ++call) {
        SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)) +
                     " at call " + std::to_string(call) + " of recovery " +
                     std::to_string(i));
        CrashFileSystem left(image, kPageBytes);
        left.FailAt(call, fault);
        OplogOptions options = SmallOptions(500, kSegmentBytes);
        options.expected.watermark = moment.durable;
        options.expected.begin = moment.not_needed;
        const bool opened = Oplog::Open(left, kLogDirectory, options).ok();
        if (call > left.calls()) break;
        if (left.faults() == 0) continue;
        ++faults;
        ASSERT_FALSE(opened && left.dead());
        ASSERT_EQ(AfterPowerLoss(left, moment, left.num_events(), 6, &disks),
                  "");
        // By this process or another one, and the power fails after that.
        Moment after = moment;
        left.Revive();
        ASSERT_EQ(Recover(left, 600, moment.durable, &after), "");
        ASSERT_EQ(AfterPowerLoss(left, after, left.num_events(), 6, &disks),
                  "");
      }
    }
  }
  EXPECT_GT(faults, 500);
  RecordProperty("faults", std::to_string(faults));
  RecordProperty("disks", std::to_string(disks));
}

}  // namespace
}  // namespace gradwire
