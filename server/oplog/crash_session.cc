// SPDX-License-Identifier: Apache-2.0
#include "server/oplog/crash_session.h"

#include <algorithm>
#include <utility>

namespace gradwire {

using Records = std::vector<LogRecord>;

CrashSession::CrashSession(CrashFileSystem& files) : files_(files) { Note(); }

void CrashSession::Note() {
  now_.event = files_.num_events();
  moments_.push_back(now_);
}

template <typename Operation>
void CrashSession::Try(Operation operation) {
  for (int i = 0; i < 4 && !dead_ && violation_.empty(); ++i) {
    if (log_ != nullptr && operation()) return;
    if (files_.dead()) {
      dead_ = true;
      return;
    }
    if (i > 0) OpenOnce();
  }
  if (!dead_ && violation_.empty()) violation_ = "the log does not recover";
}

void CrashSession::OpenOnce() {
  log_ = nullptr;
  OplogOptions options = SmallOptions(++epoch_, kSegmentBytes);
  options.expected.watermark = now_.durable;
  options.expected.begin = now_.not_needed;
  auto log = Oplog::Open(files_, kLogDirectory, options);
  if (!log.ok()) return;
  auto records = RecordsOf(**log);
  if (!records.ok()) return;
  // What was not synced may be lost by this, and is durable if it is not.
  std::erase_if(now_.records, [&](const LogRecord& record) {
    return record.end > now_.durable &&
           std::find(records->begin(), records->end(), record) ==
               records->end();
  });
  log_ = *std::move(log);
  now_.durable = log_->durable_offset();
  Note();
}

void CrashSession::Open() {
  log_ = nullptr;
  OpenOnce();
  Try([] { return true; });
}

void CrashSession::Append(int64_t bytes) {
  Try([&] {
    // Another record each time: one that was refused must not come back.
    LogRecord record = MakeRecord(++number_, bytes);
    if (!AppendTo(*log_, epoch_, &record).ok()) return false;
    now_.records.push_back(record);
    Note();
    return true;
  });
}

void CrashSession::Sync() {
  Try([&] {
    const int64_t end = log_->end();
    if (!log_->Sync(end).ok()) return false;
    now_.durable = end;
    Note();
    return true;
  });
}

void CrashSession::Trim() {
  if (dead_ || now_.records.size() < 6) return;
  now_.not_needed = now_.records[5].begin;
  Note();
  Try([&] { return log_->Trim(now_.not_needed).ok(); });
}

void CrashSession::Run() {
  Open();
  for (const int64_t bytes : {5, 30, 100}) Append(bytes);
  Sync();
  for (const int64_t bytes : {64, 200, 500, 3}) Append(bytes);
  Sync();
  for (const int64_t bytes : {0, 80}) Append(bytes);
  Trim();
  Open();
  for (const int64_t bytes : {120, 130}) Append(bytes);
  Sync();
  for (const int64_t bytes : {300, 10}) Append(bytes);
  Sync();
  Append(40);
}

const Moment& CrashSession::At(int64_t event) const {
  const auto later =
      std::find_if(moments_.begin(), moments_.end(),
                   [&](const Moment& moment) { return moment.event > event; });
  return *(later - 1);
}

namespace {

// What is wrong with an open log after what `moment` says; "" if nothing.
std::string Violation(const Oplog& log, const Moment& moment) {
  if (log.begin() > moment.not_needed)
    return "records that are needed are gone";
  const auto records = RecordsOf(log);
  if (!records.ok()) return records.status().ToString();
  Records expected = moment.records;
  std::erase_if(expected, [&](const LogRecord& record) {
    return record.begin < log.begin();
  });
  if (records->size() > expected.size() ||
      !std::equal(records->begin(), records->end(), expected.begin())) {
    return "records that were not appended, or not in this order";
  }
  if (records->size() < expected.size() &&
      expected[records->size()].end <= moment.durable) {
    return "record " + std::to_string(expected[records->size()].seq_id) +
           " is lost";
  }
  return "";
}

}  // namespace

std::string Recover(CrashFileSystem& files, int64_t epoch, int64_t watermark,
                    Moment* moment) {
  for (const bool again : {false, true}) {
    OplogOptions options = SmallOptions(epoch, kSegmentBytes);
    options.expected.watermark = again ? moment->durable : watermark;
    options.expected.begin = moment->not_needed;
    const auto log = Oplog::Open(files, kLogDirectory, options);
    if (!log.ok()) return log.status().ToString();
    std::string violation = Violation(**log, *moment);
    if (again || !violation.empty()) return violation;
    moment->records = RecordsOf(**log).value();
    LogRecord& more = moment->records.emplace_back(MakeRecord(999, 77));
    if (!AppendTo(**log, epoch, &more).ok() || !(*log)->Sync(more.end).ok()) {
      return "the log takes nothing more";
    }
    moment->durable = more.end;
    ++epoch;
  }
  return "";
}

namespace {

std::string Recover(const DiskImage& image, const Moment& moment) {
  // The watermark is recorded after the sync, and may be late.
  for (const int64_t watermark : {moment.durable, moment.not_needed}) {
    CrashFileSystem files(image, kPageBytes);
    Moment copy = moment;
    std::string violation = Recover(files, 10000, watermark, &copy);
    if (!violation.empty()) return violation;
  }
  return "";
}

// The first violation on disks that a power loss after `event` events may
// leave.
}  // namespace

std::string AfterPowerLoss(const CrashFileSystem& files, const Moment& moment,
                           int64_t event, int64_t limit, int64_t* disks) {
  std::string violation;
  *disks += files.ForEachPowerLoss(event, limit, static_cast<uint64_t>(event),
                                   [&](const DiskImage& image) {
                                     if (violation.empty())
                                       violation = Recover(image, moment);
                                   });
  if (!violation.empty()) violation += " after event " + std::to_string(event);
  return violation;
}

std::string AfterAnyPowerLoss(const CrashFileSystem& files,
                              const CrashSession& session, int64_t limit,
                              int64_t* disks) {
  std::string violation = session.violation();
  for (int64_t event = 0; event <= files.num_events() && violation.empty();
       ++event) {
    violation = AfterPowerLoss(files, session.At(event), event, limit, disks);
  }
  return violation;
}

}  // namespace gradwire
