// SPDX-License-Identifier: Apache-2.0
// Many threads append and sync one log.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint/crash_file_system.h"
#include "server/oplog/oplog.h"
#include "server/oplog/testing.h"

namespace gradwire {
namespace {

using Fault = CrashFileSystem::Fault;

std::unique_ptr<Oplog> OpenLog(FileSystem& files, int64_t segment_bytes) {
  auto log = Oplog::Open(files, kLogDirectory, SmallOptions(1, segment_bytes));
  EXPECT_TRUE(log.ok()) << log.status();
  return *std::move(log);
}

// Lets those who wait go on once it has counted so far.
class Counter {
 public:
  void Count() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++count_;
    changed_.notify_all();
  }
  void WaitFor(int count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return count_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_ = 0;
};

TEST(OplogSyncTest, CallersThatWaitTogetherShareOneSync) {
  constexpr int kThreads = 8;
  CrashFileSystem files;
  auto log = OpenLog(files, 1 << 20);
  Counter appended;
  // The first sync lasts until everybody has appended: the rest is left for the
  // second.
  files.set_before_sync([&] { appended.WaitFor(kThreads); });
  const int64_t before = files.syncs();
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      LogRecord record = MakeRecord(i, 100);
      EXPECT_TRUE(AppendTo(*log, 1, &record).ok());
      appended.Count();
      EXPECT_TRUE(log->Sync(record.end).ok());
      EXPECT_GE(log->durable_offset(), record.end);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(files.syncs() - before, 1);
  EXPECT_LE(files.syncs() - before, 2);
}

TEST(OplogSyncTest, WhatIsAppendedDuringASyncIsNotCovered) {
  CrashFileSystem files;
  auto log = OpenLog(files, 1 << 20);
  LogRecord first = MakeRecord(1, 10), late = MakeRecord(2, 10);
  ASSERT_TRUE(AppendTo(*log, 1, &first).ok());
  bool appended = false;
  files.set_after_sync([&] {
    if (std::exchange(appended, true)) return;
    std::thread other([&] { EXPECT_TRUE(AppendTo(*log, 1, &late).ok()); });
    other.join();
  });
  const int64_t before = files.syncs();
  ASSERT_TRUE(log->Sync(first.end).ok());
  EXPECT_EQ(log->durable_offset(), first.end);
  ASSERT_TRUE(log->Sync(late.end).ok());
  EXPECT_EQ(files.syncs() - before, 2);
}

TEST(OplogSyncTest, WhatIsDurableAlreadyNeedsNoSync) {
  CrashFileSystem files;
  auto log = OpenLog(files, 1 << 20);
  LogRecord first = MakeRecord(1, 10), second = MakeRecord(2, 10);
  ASSERT_TRUE(AppendTo(*log, 1, &first).ok());
  ASSERT_TRUE(AppendTo(*log, 1, &second).ok());
  const int64_t before = files.syncs();
  ASSERT_TRUE(log->Sync(second.end).ok());
  ASSERT_TRUE(log->Sync(first.end).ok());
  ASSERT_TRUE(log->Sync(second.end).ok());
  EXPECT_EQ(files.syncs() - before, 1);
}

// Nobody is told that a record is safe before it is: at every return of Sync
// the power goes, with nothing kept that was not synced.
TEST(OplogSyncTest, NobodyReturnsBeforeTheRecordIsCovered) {
  constexpr int kThreads = 4, kRecords = 25;
  CrashFileSystem files;
  auto log = OpenLog(files, 2000);
  std::mutex mutex;
  std::vector<std::pair<int64_t, LogRecord>> acknowledged;  // at an event
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int j = 0; j < kRecords; ++j) {
        LogRecord record = MakeRecord(i * kRecords + j, 10 + 7 * j);
        ASSERT_TRUE(AppendTo(*log, 1, &record).ok());
        ASSERT_TRUE(log->Sync(record.end).ok());
        std::lock_guard<std::mutex> lock(mutex);
        acknowledged.emplace_back(files.num_events(), record);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_EQ(acknowledged.size(), size_t{kThreads * kRecords});
  for (const auto& [events, record] : acknowledged) {
    files.ForEachPowerLoss(events, 2, 1, [&](const DiskImage& image) {
      CrashFileSystem left(image);
      const auto again = Oplog::Open(left, kLogDirectory, SmallOptions(2));
      ASSERT_TRUE(again.ok()) << again.status();
      const auto records = RecordsOf(**again);
      ASSERT_TRUE(records.ok()) << records.status();
      bool found = false;
      for (const LogRecord& read : *records) {
        if (read.begin != record.begin) continue;
        EXPECT_EQ(read, record);
        found = true;
      }
      EXPECT_TRUE(found) << record.begin << " is lost";
    });
  }
}

TEST(OplogSyncTest, AFailedSyncFailsAllWhoWait) {
  constexpr int kThreads = 6;
  CrashFileSystem files;
  auto log = OpenLog(files, 1 << 20);
  Counter appended;
  files.set_before_sync([&] { appended.WaitFor(kThreads); });
  std::atomic<int> failed = 0;
  std::vector<std::thread> threads;
  // Appends to a file in memory make one call each; the sync is the next.
  files.FailAt(files.calls() + kThreads + 1, Fault::kIoError);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      LogRecord record = MakeRecord(i, 100);
      EXPECT_TRUE(AppendTo(*log, 1, &record).ok());
      appended.Count();
      if (ReasonOf(log->Sync(record.end)) == "STORAGE_IO") ++failed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, kThreads);
}

// A record that found no space is cut off while another is synced, and of
// several syncs one alone is told that something could not be written.
TEST(OplogSyncTest, WhatIsCutVouchesForNothingElse) {
  CrashFileSystem files;
  auto log = OpenLog(files, 1 << 20);
  LogRecord first = MakeRecord(1, 10), refused = MakeRecord(2, 10);
  ASSERT_TRUE(AppendTo(*log, 1, &first).ok());
  std::atomic<bool> begun = false;
  std::thread other;
  files.set_before_sync([&] {
    if (begun.exchange(true)) return;
    const int64_t calls = files.calls();
    files.FailAt(calls + 1, Fault::kNoSpace);
    other =
        std::thread([&] { EXPECT_FALSE(AppendTo(*log, 1, &refused).ok()); });
    while (files.calls() == calls) std::this_thread::yield();
    // Long enough to be ready before this one, if it does not wait for it.
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    files.FailAt(files.calls() + 1, Fault::kIoError);
  });
  EXPECT_EQ(ReasonOf(log->Sync(first.end)), "STORAGE_IO");
  other.join();
  EXPECT_LT(log->durable_offset(), first.end);
}

TEST(OplogSyncTest, ReadersAndTrimmersMayBeThere) {
  CrashFileSystem files;
  auto log = OpenLog(files, 2000);
  std::thread appender([&] {
    for (int i = 0; i < 200; ++i) {
      LogRecord record = MakeRecord(i, 50);
      ASSERT_TRUE(AppendTo(*log, 1, &record).ok());
      if (i % 10 == 0) {
        ASSERT_TRUE(log->Sync(record.end).ok());
      }
    }
  });
  std::thread reader([&] {
    for (int i = 0; i < 20; ++i) {
      const int64_t from = log->begin();
      int64_t last = from;
      const absl::Status read = log->Read(from, [&](const OplogRecord& record) {
        EXPECT_GE(record.begin, last);
        last = record.end;
        return absl::OkStatus();
      });
      ASSERT_TRUE(read.ok()) << read;
      // Only this thread trims.
      ASSERT_TRUE(log->Trim(last / 2).ok());
    }
  });
  appender.join();
  reader.join();
}

}  // namespace
}  // namespace gradwire
