// SPDX-License-Identifier: Apache-2.0
// A log whose files were changed. A record that was known to be synced is never
// missing, changed or out of place: it is read back as it was, or the log does
// not open. What may be cut off is known exactly, and so is what must not.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/crash_file_system.h"
#include "server/oplog/oplog.h"
#include "server/oplog/segment_reader.h"
#include "server/oplog/testing.h"

namespace gradwire {
namespace {

struct Segment {
  std::string path;
  int64_t begin = 0, end = 0;  // log offsets
};

struct SmallLog {
  DiskImage image;
  std::vector<Segment> segments;
  std::vector<LogRecord> records;        // those of the log itself as well
  std::vector<int64_t> durable_offsets;  // by record
  int64_t durable = 0;

  // The first `count` segments alone.
  SmallLog Prefix(size_t count) const {
    SmallLog prefix = *this;
    for (size_t i = count; i < segments.size(); ++i) {
      prefix.image.files.erase(segments[i].path);
    }
    prefix.segments.resize(count);
    const int64_t end = prefix.segments.back().end;
    while (prefix.records.back().end > end) prefix.records.pop_back();
    prefix.durable_offsets.resize(prefix.records.size());
    prefix.durable = std::min(durable, end);
    return prefix;
  }
};

// Several segments, two openings, and an end that was not synced.
SmallLog MakeLog(int64_t segment_bytes) {
  SmallLog made;
  CrashFileSystem files;
  for (int64_t epoch = 1; epoch <= 2; ++epoch) {
    auto log =
        *Oplog::Open(files, kLogDirectory, SmallOptions(epoch, segment_bytes));
    for (int64_t i = 0; i < 8; ++i) {
      LogRecord record = MakeRecord(10 * epoch + i, i == 3 ? 500 : 5 + 9 * i);
      EXPECT_TRUE(AppendTo(*log, epoch, &record).ok());
      if (i % 2 == 0 && i < 6) {
        EXPECT_TRUE(log->Sync(record.end).ok());
      }
    }
    made.durable = log->durable_offset();
    made.records = *AllRecordsOf(*log);
    made.durable_offsets.clear();
    EXPECT_TRUE(log->Read(0,
                          [&](const OplogRecord& record) {
                            made.durable_offsets.push_back(
                                record.header.durable_offset);
                            return absl::OkStatus();
                          })
                    .ok());
  }
  made.image = files.Latest();
  for (const auto& [path, content] : made.image.files) {
    const int64_t begin =
        ParseSegmentName(path.substr(sizeof(kLogDirectory)))->begin;
    made.segments.push_back(
        {path, begin, begin + std::ssize(content) - kSegmentHeaderBytes});
  }
  EXPECT_GE(made.segments.size(), 4u);
  EXPECT_LT(made.durable, made.records.back().end);
  return made;
}

struct Outcome {
  absl::Status status;
  std::vector<LogRecord> records;  // without the epoch that Open appends
};

Outcome Open(const DiskImage& image, int64_t watermark) {
  CrashFileSystem files(image);
  OplogOptions options = SmallOptions(3);
  options.expected.watermark = watermark;
  auto log = Oplog::Open(files, kLogDirectory, options);
  if (!log.ok()) {
    // What is damaged is kept as it is.
    EXPECT_EQ(files.num_events(), 0);
    return {.status = log.status(), .records = {}};
  }
  // What Open has accepted can be read.
  auto records = AllRecordsOf(**log);
  EXPECT_TRUE(records.ok()) << records.status();
  if (!records.ok()) return {.status = records.status(), .records = {}};
  EXPECT_EQ(records->back().type, OplogType::kEpoch);
  records->pop_back();
  return {.status = absl::OkStatus(), .records = *std::move(records)};
}

// That `outcome` is a log whose end is `end`, or damage at `end`.
void ExpectLog(const SmallLog& log, const Outcome& outcome, int64_t end,
               bool damaged) {
  if (damaged) {
    ASSERT_EQ(ReasonOf(outcome.status), "OPLOG_CORRUPT") << outcome.status;
    ASSERT_EQ(outcome.status.code(), absl::StatusCode::kDataLoss);
    ASSERT_EQ(MetadataOf(outcome.status, "offset"), std::to_string(end));
    return;
  }
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  std::vector<LogRecord> expected = log.records;
  std::erase_if(expected, [&](const LogRecord& r) { return r.end > end; });
  ASSERT_TRUE(outcome.records == expected)
      << outcome.records.size() << " records instead of " << expected.size();
}

// What the rule says of segment `s` if its records are good up to `x`, and the
// headers of those that begin at or behind `intact_from` are as they were.
void CheckRule(const SmallLog& log, const DiskImage& image, size_t s, int64_t x,
               int64_t intact_from) {
  bool synced = s + 1 < log.segments.size();
  for (size_t i = 0; i < log.records.size(); ++i) {
    const int64_t begin = log.records[i].begin;
    if (begin >= intact_from && begin < log.segments[s].end) {
      synced = synced || log.durable_offsets[i] > x;
    }
  }
  for (const int64_t watermark : {int64_t{0}, x, x + 1, log.durable}) {
    ExpectLog(log, Open(image, watermark), x, synced || watermark > x);
  }
}

// Flips bits `mask` of every byte of the files in turn, from segment `first`
// on.
void FlipEveryByte(const SmallLog& log, size_t first, char mask) {
  for (size_t s = first; s < log.segments.size(); ++s) {
    const Segment& segment = log.segments[s];
    DiskImage image = log.image;
    std::string& content = image.files[segment.path];
    for (size_t at = 0; at < content.size(); ++at) {
      SCOPED_TRACE(segment.path + " byte " + std::to_string(at));
      content[at] = static_cast<char>(content[at] ^ mask);
      const int64_t offset =
          segment.begin + static_cast<int64_t>(at) - kSegmentHeaderBytes;
      if (offset < segment.begin) {
        // Behind a header there are records, so the header had been synced.
        ExpectLog(log, Open(image, 0), segment.begin, true);
      } else {
        const auto hit = std::find_if(
            log.records.begin(), log.records.end(),
            [&](const LogRecord& record) { return offset < record.end; });
        CheckRule(log, image, s, hit->begin, hit->end);
      }
      content[at] = static_cast<char>(content[at] ^ mask);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(OplogDamageTest, EveryFlippedByteIsFoundOrLegallyCut) {
  const SmallLog log = MakeLog(420);
  ExpectLog(log, Open(log.image, log.durable), log.records.back().end, false);
  for (const char mask : {'\x01', '\xff'}) FlipEveryByte(log, 0, mask);
}

// The same in the last segment of shorter logs, sealed or not.
TEST(OplogDamageTest, EveryFlippedByteOfAnEndIsFoundOrLegallyCut) {
  const SmallLog log = MakeLog(420);
  for (size_t count = 1; count < log.segments.size(); ++count) {
    FlipEveryByte(log.Prefix(count), count - 1, '\x80');
  }
}

TEST(OplogDamageTest, EveryTruncationIsFoundOrLegallyCut) {
  for (const int64_t segment_bytes : {420, 700}) {
    const SmallLog log = MakeLog(segment_bytes);
    for (size_t s = 0; s < log.segments.size(); ++s) {
      const Segment& segment = log.segments[s];
      const std::string whole = log.image.files.at(segment.path);
      for (int64_t length = 0; length < std::ssize(whole); ++length) {
        SCOPED_TRACE(segment.path + " cut to " + std::to_string(length));
        DiskImage image = log.image;
        image.files[segment.path] =
            whole.substr(0, static_cast<size_t>(length));
        // The end of the last record that is whole.
        int64_t x = segment.begin;
        for (const LogRecord& record : log.records) {
          if (record.begin >= segment.begin &&
              record.end - segment.begin + kSegmentHeaderBytes <= length) {
            x = record.end;
          }
        }
        // Nothing behind x is left to speak for itself.
        CheckRule(log, image, s, x, segment.end);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(OplogDamageTest, AMissingSegmentIsFoundUnlessItIsTheEnd) {
  const SmallLog log = MakeLog(420);
  for (size_t s = 0; s < log.segments.size(); ++s) {
    DiskImage image = log.image;
    image.files.erase(log.segments[s].path);
    const int64_t begin = log.segments[s].begin;
    const bool last = s + 1 == log.segments.size();
    ExpectLog(log, Open(image, 0), begin, !last);
    ExpectLog(log, Open(image, begin), begin, !last);
    ExpectLog(log, Open(image, begin + 1), begin, true);
  }
}

TEST(OplogDamageTest, NothingStandsBehindASeal) {
  const SmallLog log = MakeLog(420);
  size_t sealed = 0;
  for (size_t count = 1; count < log.segments.size(); ++count) {
    const SmallLog prefix = log.Prefix(count);
    const bool seal = prefix.records.back().type == OplogType::kSeal;
    const int64_t end = prefix.segments.back().end;
    for (const std::string& more :
         {std::string(1, '\0'), std::string(99, 'x')}) {
      DiskImage image = prefix.image;
      image.files[prefix.segments.back().path] += more;
      // Without a seal it is the beginning of a record.
      ExpectLog(prefix, Open(image, 0), end, seal);
    }
    sealed += seal ? 1 : 0;
  }
  EXPECT_GT(sealed, 2u);
  EXPECT_LT(sealed, log.segments.size() - 1);
}

// One change of many kinds, drawn by `seed`.
DiskImage Damage(const SmallLog& log, uint32_t seed) {
  std::mt19937 random(seed);
  DiskImage image = log.image;
  const auto pick = [&]() -> std::string& {
    return image.files[log.segments[random() % log.segments.size()].path];
  };
  std::string& content = pick();
  const size_t at = random() % content.size();
  const size_t count = 1 + random() % (random() % 2 == 0 ? 16 : 400);
  const size_t end = std::min(at + count, content.size());
  std::string& other = pick();
  switch (random() % 8) {
    case 0:
      for (size_t i = at; i < end; ++i)
        content[i] = static_cast<char>(random());
      break;
    case 1:
      std::fill(content.begin() + at, content.begin() + end, '\0');
      break;
    case 2:  // a block of another place
      content.replace(at, end - at,
                      other.substr(random() % other.size(), end - at));
      break;
    case 3:
      content.erase(at, end - at);
      break;
    case 4:
      content.insert(at, other.substr(random() % other.size(), count));
      break;
    case 5:
      std::swap(content, other);
      break;
    case 6:  // a segment under another one's name
      content = other;
      break;
    case 7:  // more at the end than was written
      content += random() % 2 == 0 ? std::string(count, '\0')
                                   : other.substr(random() % other.size());
      break;
  }
  return image;
}

TEST(OplogDamageTest, AnyDamageLeavesAPrefixOrIsFound) {
  int opened = 0, found = 0;
  for (const int64_t segment_bytes : {420, 900}) {
    const SmallLog log = MakeLog(segment_bytes);
    for (uint32_t seed = 0; seed < 1500; ++seed) {
      SCOPED_TRACE(seed);
      const DiskImage image = Damage(log, seed);
      for (const int64_t watermark : {int64_t{0}, log.durable}) {
        const Outcome outcome = Open(image, watermark);
        if (!outcome.status.ok()) {
          ASSERT_EQ(ReasonOf(outcome.status), "OPLOG_CORRUPT")
              << outcome.status;
          ++found;
          continue;
        }
        ++opened;
        const auto& records = outcome.records;
        ASSERT_LE(records.size(), log.records.size());
        ASSERT_TRUE(
            std::equal(records.begin(), records.end(), log.records.begin()));
        ASSERT_TRUE(!records.empty() || watermark == 0);
        if (!records.empty()) {
          ASSERT_GE(records.back().end, watermark);
        }
      }
    }
  }
  EXPECT_GT(opened, 300);
  EXPECT_GT(found, 2500);
}

// Payloads that look like what stands around them.
TEST(OplogDamageTest, APayloadCannotPassForARecord) {
  CrashFileSystem files;
  auto log = *Oplog::Open(files, kLogDirectory, SmallOptions(1, 100000));
  const std::string path = std::string(kLogDirectory) + "/" + SegmentName(1, 0);
  std::vector<LogRecord> records;
  const auto append = [&](const std::string& payload) {
    LogRecord record = MakeRecord(std::ssize(records), 0);
    record.payload = payload;
    ASSERT_TRUE(AppendTo(*log, 1, &record).ok());
    records.push_back(record);
  };
  append("a record");
  ASSERT_TRUE(log->Sync(log->end()).ok());
  // All of the segment up to now, twice: with its header, and so that its
  // records stand where they say they do, but for the multiple of a length.
  const std::string segment = files.Latest().files.at(path);
  append(segment + segment);
  append(segment.substr(40));
  // Records of a segment whose random numbers were guessed, claiming that
  // everything is synced.
  std::string guesses;
  const int64_t begin = log->end() + kRecordHeaderBytes;
  for (uint32_t guess = 0; guess < 1000; ++guess) {
    const int64_t offset = begin + std::ssize(guesses);
    guesses +=
        EncodeRecordHeader({.epoch = 1, .durable_offset = offset},
                           {.epoch = 1, .tag = guess, .seed = guess}, offset);
  }
  append(guesses);
  EXPECT_EQ(*RecordsOf(*log), records);

  // The last three were never synced: torn at any byte they are cut off, though
  // what they hold speaks of records behind.
  const DiskImage image = files.Latest();
  for (size_t torn = 1; torn < records.size(); ++torn) {
    const LogRecord& record = records[torn];
    for (const int64_t at : {record.begin, record.begin + 20, record.end - 1}) {
      DiskImage changed = image;
      changed.files[path][static_cast<size_t>(at + 40)] ^= 1;
      Outcome outcome = Open(changed, record.begin);
      ASSERT_TRUE(outcome.status.ok()) << outcome.status;
      std::erase_if(outcome.records, [](const LogRecord& read) {
        return read.type == OplogType::kEpoch;
      });
      EXPECT_EQ(outcome.records, std::vector<LogRecord>(
                                     records.begin(), records.begin() + torn));
      // And a record that was synced is not.
      outcome = Open(changed, record.begin + 1);
      EXPECT_EQ(ReasonOf(outcome.status), "OPLOG_CORRUPT");
    }
  }
}

// A declared length that is not there must cost no memory: the file is short.
TEST(OplogDamageTest, ADeclaredLengthIsNotBelieved) {
  const SegmentHeader segment = {.epoch = 1, .begin = 0, .tag = 5, .seed = 6};
  for (const int64_t declared : {int64_t{1}, int64_t{100}, kMaxPayloadBytes}) {
    const std::string content =
        EncodeSegmentHeader(segment) +
        EncodeRecordHeader({.payload_bytes = declared, .epoch = 1}, segment,
                           0) +
        std::string(16, 'x');
    const DiskImage image = {
        .files = {{std::string(kLogDirectory) + "/" + SegmentName(1, 0),
                   content}},
        .directories = {kLogDirectory}};
    const Outcome outcome = Open(image, 0);
    ASSERT_TRUE(outcome.status.ok()) << outcome.status;
    EXPECT_TRUE(outcome.records.empty());

    CrashFileSystem files(image);
    auto reader = SegmentReader::Open(files, kLogDirectory, SegmentName(1, 0));
    ASSERT_TRUE(reader.ok()) << reader.status();
    RecordHeader record;
    std::string payload;
    EXPECT_EQ((*reader)->Next(&record, &payload).value(),
              SegmentReader::Found::kInvalid);
    EXPECT_EQ(record.payload_bytes, declared);
    EXPECT_LT(payload.capacity(), 100u);
  }
}

// A header that is far behind, where another window begins.
TEST(OplogDamageTest, LaterRecordsAreFoundHoweverFar) {
  for (int64_t shift = 0; shift < 60; shift += 7) {
    CrashFileSystem files({}, 1 << 20);
    auto log = *Oplog::Open(files, kLogDirectory, SmallOptions(1, 64 << 20));
    LogRecord first = MakeRecord(1, 100);
    LogRecord large = MakeRecord(2, (2 << 20) - 300 + shift);
    LogRecord last = MakeRecord(3, 10);
    ASSERT_TRUE(AppendTo(*log, 1, &first).ok());
    ASSERT_TRUE(AppendTo(*log, 1, &large).ok());
    ASSERT_TRUE(log->Sync(large.end).ok());
    DiskImage image = files.Latest();
    const std::string path = image.files.begin()->first;
    const size_t damaged = static_cast<size_t>(40 + first.begin + 70);
    // Alone, nothing says that the first record had been synced.
    image.files[path][damaged] ^= 1;
    EXPECT_TRUE(Open(image, 0).status.ok());
    ASSERT_TRUE(AppendTo(*log, 1, &last).ok());
    image = files.Latest();
    image.files[path][damaged] ^= 1;
    EXPECT_EQ(ReasonOf(Open(image, 0).status), "OPLOG_CORRUPT") << shift;
  }
}

}  // namespace
}  // namespace gradwire
