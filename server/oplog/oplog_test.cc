// SPDX-License-Identifier: Apache-2.0
// The log on disks that do as they are told.
#include "server/oplog/oplog.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/crc32c.h"
#include "checkpoint/crash_file_system.h"
#include "server/oplog/testing.h"

namespace gradwire {
namespace {

using Fault = CrashFileSystem::Fault;
using Records = std::vector<LogRecord>;

std::unique_ptr<Oplog> OpenLog(FileSystem& files, const OplogOptions& options) {
  auto log = Oplog::Open(files, kLogDirectory, options);
  EXPECT_TRUE(log.ok()) << log.status();
  return *std::move(log);
}

// Appends records `first` to `last`, of 40 bytes and more.
Records AppendSome(Oplog& log, int64_t epoch, int64_t first, int64_t last) {
  Records records;
  for (int64_t i = first; i <= last; ++i) {
    records.push_back(MakeRecord(i, 40 + i));
    EXPECT_TRUE(AppendTo(log, epoch, &records.back()).ok());
  }
  return records;
}

std::vector<std::string> Segments(FileSystem& files) {
  return *files.List(kLogDirectory);
}

TEST(OplogTest, ReadsBackWhatWasAppended) {
  CrashFileSystem files;
  Records records;
  {
    auto log = OpenLog(files, SmallOptions(1));
    for (const int64_t bytes : {0, 1, 15, 16, 17, 100, 5000}) {
      for (const auto type : {OplogType::kOp, OplogType::kDone,
                              OplogType::kFailed, OplogType::kCheckpointRef}) {
        records.push_back(MakeRecord(std::ssize(records) - 5, bytes));
        records.back().type = type;
        ASSERT_TRUE(AppendTo(*log, 1, &records.back()).ok());
      }
    }
    EXPECT_EQ(RecordsOf(*log).value(), records);
    EXPECT_LT(log->durable_offset(), log->end());
    EXPECT_TRUE(log->Sync(log->end()).ok());
    EXPECT_EQ(log->durable_offset(), log->end());
  }
  auto log = OpenLog(files, SmallOptions(2));
  EXPECT_EQ(RecordsOf(*log).value(), records);
  EXPECT_EQ(log->durable_offset(), log->end());
}

TEST(OplogTest, OffsetsGoOnOverSegmentsAndOpenings) {
  CrashFileSystem files;
  int64_t end = 0;
  for (int64_t epoch = 1; epoch <= 4; ++epoch) {
    auto log = OpenLog(files, SmallOptions(epoch));
    AppendSome(*log, epoch, 1, 12);
    const Records all = AllRecordsOf(*log).value();
    end = 0;
    for (const LogRecord& record : all) {
      EXPECT_EQ(record.begin, end);
      EXPECT_EQ(record.end - record.begin, 72 + std::ssize(record.payload));
      end = record.end;
    }
    EXPECT_EQ(log->end(), end);
    EXPECT_EQ(log->begin(), 0);
  }
  // Epochs as they were, seals where a segment was full.
  auto log = OpenLog(files, SmallOptions(5));
  const Records all = AllRecordsOf(*log).value();
  EXPECT_EQ(all[0].type, OplogType::kEpoch);
  EXPECT_EQ(all.back().type, OplogType::kEpoch);
  EXPECT_EQ(
      std::ssize(Segments(files)),
      1 +
          std::count_if(all.begin(), all.end() - 1,
                        [](const LogRecord& record) {
                          return record.type == OplogType::kEpoch;
                        }) +
          std::count_if(all.begin(), all.end(), [](const LogRecord& record) {
            return record.type == OplogType::kSeal;
          }));
}

TEST(OplogTest, SegmentsAreNoLongerThanAllowed) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  AppendSome(*log, 1, 1, 60);
  const auto names = Segments(files);
  EXPECT_GT(names.size(), 10u);
  for (const std::string& name : names) {
    EXPECT_LE(files.Stat(std::string(kLogDirectory) + "/" + name)->bytes, 400);
  }
}

TEST(OplogTest, ALargeRecordHasASegmentOfItsOwn) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  LogRecord large = MakeRecord(1, 3000), small = MakeRecord(2, 10);
  ASSERT_TRUE(AppendTo(*log, 1, &large).ok());
  ASSERT_TRUE(AppendTo(*log, 1, &small).ok());
  EXPECT_EQ(Segments(files).size(), 3u);
  EXPECT_EQ(Segments(files)[1], SegmentName(1, large.begin));
  EXPECT_EQ(RecordsOf(*log).value(), (Records{large, small}));
}

// Written and hashed in several parts.
TEST(OplogTest, PartsOfAVeryLargeRecordMakeOne) {
  CrashFileSystem files({}, 1 << 20);
  LogRecord large = MakeRecord(1, (9 << 20) + 5), small = MakeRecord(2, 10);
  {
    auto log = OpenLog(files, SmallOptions(1, 64 << 20));
    ASSERT_TRUE(AppendTo(*log, 1, &large).ok());
    ASSERT_TRUE(AppendTo(*log, 1, &small).ok());
    EXPECT_EQ(Segments(files).size(), 1u);
  }
  auto log = OpenLog(files, SmallOptions(2, 64 << 20));
  EXPECT_TRUE(RecordsOf(*log).value() == (Records{large, small}));
}

TEST(OplogTest, ReadsFromAnOffsetOn) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  const Records records = AppendSome(*log, 1, 1, 12);
  for (size_t i = 0; i < records.size(); ++i) {
    std::vector<int64_t> begins;
    ASSERT_TRUE(log->Read(records[i].begin,
                          [&](const OplogRecord& record) {
                            if (record.header.type < OplogType::kEpoch) {
                              begins.push_back(record.begin);
                            }
                            return absl::OkStatus();
                          })
                    .ok());
    ASSERT_EQ(begins.size(), records.size() - i);
    EXPECT_EQ(begins[0], records[i].begin);
  }
}

TEST(OplogTest, AVisitorMayStop) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  AppendSome(*log, 1, 1, 5);
  int visits = 0;
  const absl::Status enough = absl::CancelledError("enough");
  EXPECT_EQ(log->Read(0,
                      [&](const OplogRecord&) {
                        return ++visits == 3 ? enough : absl::OkStatus();
                      }),
            enough);
  EXPECT_EQ(visits, 3);
}

TEST(OplogTest, ARecordKnowsWhatWasDurable) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1, 4000));
  Records records = AppendSome(*log, 1, 1, 2);
  ASSERT_TRUE(log->Sync(records[0].end).ok());
  const Records more = AppendSome(*log, 1, 3, 4);
  std::vector<int64_t> durable;
  ASSERT_TRUE(log->Read(records[0].begin,
                        [&](const OplogRecord& record) {
                          durable.push_back(record.header.durable_offset);
                          return absl::OkStatus();
                        })
                  .ok());
  // The sync covered all that had been appended.
  EXPECT_EQ(durable, (std::vector<int64_t>{records[0].begin, records[0].begin,
                                           records[1].end, records[1].end}));
}

TEST(OplogTest, TrimRemovesWholeSegmentsOnly) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  const Records records = AppendSome(*log, 1, 1, 20);
  ASSERT_TRUE(log->Sync(log->end()).ok());
  const size_t all = Segments(files).size();
  ASSERT_GT(all, 4u);
  for (const LogRecord& record : records) {
    ASSERT_TRUE(log->Trim(record.begin).ok());
    EXPECT_LE(log->begin(), record.begin);
    EXPECT_EQ(Segments(files)[0], SegmentName(1, log->begin()));
    const Records left = RecordsOf(*log).value();
    EXPECT_NE(std::find(left.begin(), left.end(), record), left.end());
  }
  ASSERT_TRUE(log->Trim(log->end() + 1000).ok());
  EXPECT_EQ(Segments(files).size(), 1u);
  const int64_t begin = log->begin();
  EXPECT_GT(begin, 0);

  OplogOptions options = SmallOptions(2);
  options.expected.begin = begin;
  EXPECT_EQ(OpenLog(files, options)->begin(), begin);
  // Who needs more than there is must not believe that there was no more.
  options = SmallOptions(3);
  options.expected.begin = begin - 1;
  const auto missing = Oplog::Open(files, kLogDirectory, options);
  EXPECT_EQ(ReasonOf(missing.status()), "OPLOG_CORRUPT");
}

TEST(OplogTest, ALogThatEndsBelowTheWatermarkIsDamaged) {
  CrashFileSystem empty;
  OplogOptions options = SmallOptions(1);
  options.expected.watermark = 1;
  EXPECT_EQ(ReasonOf(Oplog::Open(empty, kLogDirectory, options).status()),
            "OPLOG_CORRUPT");

  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  AppendSome(*log, 1, 1, 3);
  options = SmallOptions(2);
  options.expected.watermark = log->end() + 1;
  const absl::Status status =
      Oplog::Open(files, kLogDirectory, options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ReasonOf(status), "OPLOG_CORRUPT");
  EXPECT_EQ(MetadataOf(status, "segment"), Segments(files).back());
  EXPECT_EQ(MetadataOf(status, "offset"), std::to_string(log->end()));
}

TEST(OplogTest, LowerEpochsAreShutOut) {
  CrashFileSystem files;
  auto first = OpenLog(files, SmallOptions(3));
  AppendSome(*first, 3, 1, 3);
  LogRecord other = MakeRecord(9, 9);
  for (const int64_t epoch : {2, 4}) {
    const absl::Status status = AppendTo(*first, epoch, &other);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(ReasonOf(status), "EPOCH_FENCED");
  }
  auto second = OpenLog(files, SmallOptions(5));
  const DiskImage before = files.Latest();
  const absl::Status status =
      Oplog::Open(files, kLogDirectory, SmallOptions(4)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(status), "EPOCH_FENCED");
  EXPECT_EQ(MetadataOf(status, "epoch"), "4");
  EXPECT_EQ(MetadataOf(status, "highest"), "5");
  EXPECT_EQ(files.Latest(), before);
  // The same epoch may come back.
  EXPECT_EQ(RecordsOf(*OpenLog(files, SmallOptions(5)))->size(), 3u);
}

// The header of a segment or record as another version would write it.
std::string WithVersion(std::string header, size_t at, size_t crc_at,
                        uint32_t seed) {
  header[at] = 2;
  uint32_t crc = Crc32c(header.data(), static_cast<int64_t>(crc_at), seed);
  crc = Crc32c(header.data() + crc_at + 4,
               std::ssize(header) - static_cast<int64_t>(crc_at) - 4, crc);
  return header.replace(crc_at, 4, reinterpret_cast<const char*>(&crc), 4);
}

TEST(OplogTest, ANewerFormatIsRefused) {
  CrashFileSystem files;
  LogRecord record = MakeRecord(1, 10);
  {
    auto log = OpenLog(files, SmallOptions(1));
    ASSERT_TRUE(AppendTo(*log, 1, &record).ok());
  }
  const std::string path = std::string(kLogDirectory) + "/" + SegmentName(1, 0);
  const std::string content = files.Latest().files.at(path);
  int version = 0;
  SegmentHeader segment;
  ASSERT_EQ(DecodeSegmentHeader(content.substr(0, 40), &segment, &version),
            HeaderState::kValid);

  std::string newer_segment = content;
  newer_segment.replace(0, 40, WithVersion(content.substr(0, 40), 8, 20, 0));
  std::string newer_record = content;
  const auto at = static_cast<size_t>(40 + record.begin);
  newer_record.replace(at, 56,
                       WithVersion(content.substr(at, 56), 8, 12,
                                   Crc32c(&record.begin, 8, segment.seed)));
  // Found again behind damage.
  std::string newer_later = newer_record;
  newer_later[40 + 20] ^= 1;
  for (const std::string& bytes : {newer_segment, newer_record, newer_later}) {
    CrashFileSystem changed(
        {.files = {{path, bytes}}, .directories = {kLogDirectory}});
    const absl::Status status =
        Oplog::Open(changed, kLogDirectory, SmallOptions(2)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(ReasonOf(status), "STATE_VERSION");
    EXPECT_EQ(MetadataOf(status, "have"), "2");
    EXPECT_EQ(MetadataOf(status, "need"), "1");
    EXPECT_EQ(changed.Latest().files.at(path), bytes);
  }
}

TEST(OplogTest, AFullDiskRefusesARecordAndKeepsTheLog) {
  for (const Fault fault : {Fault::kNoSpace, Fault::kShortWrite}) {
    CrashFileSystem files;
    auto log = OpenLog(files, SmallOptions(1, 4000));
    Records records = AppendSome(*log, 1, 1, 3);
    const int64_t end = log->end();
    LogRecord refused = MakeRecord(99, 100);
    files.FailAt(files.calls() + 1, fault);
    const absl::Status status = AppendTo(*log, 1, &refused);
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(ReasonOf(status), "STORAGE_FULL");
    EXPECT_EQ(log->end(), end);
    // The part that was written is gone, and so is not for the next process.
    EXPECT_EQ(
        files.Stat(std::string(kLogDirectory) + "/" + SegmentName(1, 0))->bytes,
        40 + end);
    for (const LogRecord& record : AppendSome(*log, 1, 4, 6)) {
      records.push_back(record);
    }
    EXPECT_TRUE(log->Sync(log->end()).ok());
    EXPECT_EQ(RecordsOf(*log).value(), records);
    EXPECT_EQ(RecordsOf(*OpenLog(files, SmallOptions(2))).value(), records);
  }
}

TEST(OplogTest, AFullDiskRefusesANewSegmentAndKeepsTheLog) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  Records records = AppendSome(*log, 1, 1, 1);
  LogRecord large = MakeRecord(2, 2000);
  // The calls are: seal, sync, create, write the header. The first is refused;
  // then, with a segment that is already sealed, the others that may be.
  for (const int64_t ahead : {1, 3, 1, 2}) {
    const int64_t faults = files.faults();
    files.FailAt(files.calls() + ahead, Fault::kNoSpace);
    EXPECT_EQ(ReasonOf(AppendTo(*log, 1, &large)), "STORAGE_FULL") << ahead;
    EXPECT_EQ(files.faults(), faults + 1);
  }
  ASSERT_TRUE(AppendTo(*log, 1, &large).ok());
  records.push_back(large);
  EXPECT_EQ(RecordsOf(*log).value(), records);
  EXPECT_EQ(RecordsOf(*OpenLog(files, SmallOptions(2))).value(), records);
}

TEST(OplogTest, AFailedSyncIsFinal) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1, 4000));
  Records records = AppendSome(*log, 1, 1, 3);
  ASSERT_TRUE(log->Sync(log->end()).ok());
  const int64_t durable = log->durable_offset();
  records.push_back(AppendSome(*log, 1, 4, 4)[0]);
  files.FailAt(files.calls() + 1, Fault::kIoError);
  const absl::Status failed = log->Sync(log->end());
  EXPECT_EQ(failed.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(failed), "STORAGE_IO");
  // The next would succeed, and lie.
  const int64_t syncs = files.syncs();
  EXPECT_EQ(log->Sync(log->end()), failed);
  LogRecord more = MakeRecord(5, 5);
  EXPECT_EQ(AppendTo(*log, 1, &more), failed);
  EXPECT_EQ(files.syncs(), syncs);
  EXPECT_EQ(log->durable_offset(), durable);
  EXPECT_TRUE(log->Sync(durable).ok());
  // Opened again, it writes anew what it finds.
  auto again = OpenLog(files, SmallOptions(1, 4000));
  EXPECT_EQ(RecordsOf(*again).value(), records);
  EXPECT_GT(again->durable_offset(), durable);
}

TEST(OplogTest, WhatCannotBeUndoneIsFinal) {
  struct Case {
    const char* what;
    int64_t record_bytes;
    std::vector<std::pair<int64_t, Fault>> faults;  // by calls ahead
  };
  // A small record is one write; of a short one follow the rest, the truncation
  // and its sync. A large one is preceded by seal, sync, create, header, sync,
  // sync of the directory.
  const Case cases[] = {
      {"truncation", 10, {{1, Fault::kNoSpace}, {2, Fault::kIoError}}},
      {"its sync", 10, {{1, Fault::kNoSpace}, {3, Fault::kIoError}}},
      {"removal", 2000, {{4, Fault::kNoSpace}, {5, Fault::kIoError}}},
      {"sync of the header", 2000, {{5, Fault::kIoError}}},
      {"sync of the directory", 2000, {{6, Fault::kIoError}}},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    CrashFileSystem files;
    auto log = OpenLog(files, SmallOptions(1));
    const Records records = AppendSome(*log, 1, 1, 2);
    for (const auto& [ahead, fault] : c.faults) {
      files.FailAt(files.calls() + ahead, fault);
    }
    LogRecord refused = MakeRecord(3, c.record_bytes);
    const absl::Status failed = AppendTo(*log, 1, &refused);
    EXPECT_EQ(ReasonOf(failed), "STORAGE_IO");
    EXPECT_EQ(files.faults(), std::ssize(c.faults));
    const int64_t calls = files.calls();
    EXPECT_EQ(AppendTo(*log, 1, &refused), failed);
    EXPECT_EQ(files.calls(), calls);
    EXPECT_EQ(RecordsOf(*OpenLog(files, SmallOptions(2))).value(), records);
  }
}

TEST(OplogTest, DamageWhileItIsOpenIsFoundByReading) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  const Records records = AppendSome(*log, 1, 1, 9);
  const std::string path = std::string(kLogDirectory) + "/" + SegmentName(1, 0);
  auto file = files.Open(path, FileSystem::Access::kReadWrite);
  ASSERT_TRUE((*file)->WriteAt(40 + records[0].begin + 60, "?").ok());
  const absl::Status status = RecordsOf(*log).status();
  EXPECT_EQ(ReasonOf(status), "OPLOG_CORRUPT");
  EXPECT_EQ(MetadataOf(status, "segment"), SegmentName(1, 0));
  EXPECT_EQ(MetadataOf(status, "offset"), std::to_string(records[0].begin));
}

TEST(OplogTest, OtherFilesAreLeftAlone) {
  CrashFileSystem files(
      {.files = {{"/log/README", "hands off"}}, .directories = {"/log"}});
  OpenLog(files, SmallOptions(1));
  OpenLog(files, SmallOptions(2));
  EXPECT_EQ(files.Latest().files.at("/log/README"), "hands off");
}

TEST(OplogTest, RunsOnTheMachinesFiles) {
  const std::string directory = testing::TempDir() + "/oplog_test_log";
  std::filesystem::remove_all(directory);
  Records records;
  {
    auto log = Oplog::Open(PosixFileSystem(), directory, OplogOptions());
    ASSERT_TRUE(log.ok()) << log.status();
    for (const int64_t bytes : {0, 1000, 5 << 20, 70 << 20, 3}) {
      records.push_back(MakeRecord(std::ssize(records), bytes));
      ASSERT_TRUE(AppendTo(**log, 1, &records.back()).ok());
    }
    ASSERT_TRUE((*log)->Sync((*log)->end()).ok());
  }
  const auto all = std::filesystem::perms::all;
  EXPECT_EQ(std::filesystem::status(directory).permissions() & all,
            std::filesystem::perms::owner_all);
  auto log = Oplog::Open(PosixFileSystem(), directory, OplogOptions());
  ASSERT_TRUE(log.ok()) << log.status();
  EXPECT_TRUE(RecordsOf(**log).value() == records);
  std::filesystem::remove_all(directory);
}

// The system's own short write, without a full disk: a limit on the length of
// files.
TEST(OplogTest, AShortWriteOfTheSystemIsCut) {
  const std::string directory = testing::TempDir() + "/oplog_test_limit";
  std::filesystem::remove_all(directory);
  auto log = *Oplog::Open(PosixFileSystem(), directory, OplogOptions());
  Records records = AppendSome(*log, 1, 1, 3);
  ASSERT_TRUE(log->Sync(records[1].end).ok());

  rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  rlimit low = limit;
  low.rlim_cur = static_cast<rlim_t>(log->end()) + 5000;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &low), 0);
  absl::Status refused;
  for (const int64_t bytes : {int64_t{100000}, int64_t{2} << 20}) {
    LogRecord record = MakeRecord(50, bytes);
    refused = AppendTo(*log, 1, &record);
    EXPECT_EQ(ReasonOf(refused), "STORAGE_IO") << refused;
    EXPECT_EQ(log->end(), records.back().end);
    EXPECT_EQ(std::filesystem::file_size(directory + "/" + SegmentName(1, 0)),
              static_cast<uintmax_t>(40 + log->end()));
  }
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, handler);

  for (const LogRecord& record : AppendSome(*log, 1, 4, 6)) {
    records.push_back(record);
  }
  EXPECT_EQ(RecordsOf(*log).value(), records);
  EXPECT_TRUE(log->Sync(log->end()).ok());
  log = *Oplog::Open(PosixFileSystem(), directory, OplogOptions());
  EXPECT_EQ(RecordsOf(*log).value(), records);
  std::filesystem::remove_all(directory);
}

using OplogDeathTest = testing::Test;

TEST(OplogDeathTest, MistakesOfTheOwnerEndTheProcess) {
  CrashFileSystem files;
  auto log = OpenLog(files, SmallOptions(1));
  EXPECT_DEATH((void)log->Sync(log->end() + 1), "through <= end_");
  EXPECT_DEATH(
      (void)log->Append({.type = OplogType::kSeal, .epoch = 1, .payload = {}}),
      "kSeal");
}

}  // namespace
}  // namespace gradwire
