// SPDX-License-Identifier: Apache-2.0
// A session with the log on a CrashFileSystem, what it was promised at any
// time, and whether a disk that is left keeps the promise: each record that
// Sync covered, in order, then perhaps more of those that were appended, and
// nothing else.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/crash_file_system.h"
#include "server/oplog/oplog.h"
#include "server/oplog/testing.h"

namespace gradwire {

// Small, so that records are torn in many ways.
inline constexpr int64_t kPageBytes = 64;
inline constexpr int64_t kSegmentBytes = 420;

// What holds from one event of the file system on.
struct Moment {
  int64_t event = 0;
  std::vector<LogRecord> records = {};  // appended
  int64_t durable = 0;     // those that end here or below are promised
  int64_t not_needed = 0;  // those below may have been trimmed
};

// What an owner does, and what it was told. Appends, syncs, a rotation by size,
// a record with a segment of its own, a trim, a second opening, and an end that
// is not synced. What fails is tried again, then with the log opened anew.
class CrashSession {
 public:
  explicit CrashSession(CrashFileSystem& files);

  void Run();

  // What held after so many events.
  const Moment& At(int64_t event) const;
  // Of what was seen on the way; "" if nothing.
  const std::string& violation() const { return violation_; }

 private:
  void Note();
  template <typename Operation>
  void Try(Operation operation);
  void Open();
  void OpenOnce();
  void Append(int64_t bytes);
  void Sync();
  void Trim();

  CrashFileSystem& files_;
  std::unique_ptr<Oplog> log_;
  int64_t epoch_ = 0, number_ = 0;
  bool dead_ = false;  // whoever was killed does nothing more
  Moment now_;
  std::vector<Moment> moments_;
  std::string violation_;
};

// Each says what is wrong; "" if nothing.

// Opens what is left on a disk with `epoch`, goes on, and opens it again with
// the next. `moment` is then what holds.
std::string Recover(CrashFileSystem& files, int64_t epoch, int64_t watermark,
                    Moment* moment);
// Recovers from disks that a power loss after `event` events may leave, when
// `moment` holds. Adds their number to `disks`.
std::string AfterPowerLoss(const CrashFileSystem& files, const Moment& moment,
                           int64_t event, int64_t limit, int64_t* disks);
// The same after any number of events of a session.
std::string AfterAnyPowerLoss(const CrashFileSystem& files,
                              const CrashSession& session, int64_t limit,
                              int64_t* disks);

}  // namespace gradwire
