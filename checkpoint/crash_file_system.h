// SPDX-License-Identifier: Apache-2.0
// Files in memory that fail on request and tell what a power loss may leave of
// them. Durable code runs on it, is interrupted at every call in turn, and must
// then recover from every disk that a power loss could have left.
//
// What fails. Calls are counted from 1, reads and listings among them. At the
// chosen call one of these happens, if the call can fail in that way (if not,
// nothing does):
//   kKill        it and every later call fail and change nothing: the process
//                is gone, and with it all that it might still have done;
//   kNoSpace     ENOSPC: of creations, writes, renamings and syncs of files;
//   kIoError     EIO: of any call. Of a sync: see below;
//   kShortWrite  half of the bytes are written, and the next write fails with
//                ENOSPC.
//
// What a power loss leaves. Every change stays in memory until a sync; until
// then the disk may have any part of it:
//   - a file's bytes, page by page (page_bytes; a page is what the disk writes
//     at once): each page is as it was at the last sync or after any write or
//     truncation since, no matter what became of other pages or of earlier
//     writes;
//   - a file's length, as at the last sync or after any change since, no matter
//     which pages came through: those within it that did not are zeros, or what
//     they held before;
//   - a directory's entries: each creation, link, renaming, exchange and
//     removal since the last SyncDirectory has happened or not, in any
//     combination; a renaming is one change, and so is an exchange. Syncing a
//     file does not keep its name.
// A sync that fails promises nothing, and what it was to write the system
// forgets: the pages and the length remain uncertain, through later syncs that
// succeed, until they are written again. (A directory's entries do not: a file
// system whose journal fails stops writing altogether.)
// Processes see neither: after kKill everything is there that was written.
//
// Left out: symbolic links, permissions, times.
//
// Thread rule: any method from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "checkpoint/crash_disk.h"
#include "checkpoint/file_system.h"

namespace gradwire {

class CrashFileSystem : public FileSystem {
 public:
  enum class Fault { kKill, kNoSpace, kIoError, kShortWrite };
  // What is left undone although the call succeeds, to see that tests notice:
  // syncs of files, syncs of directories, writes that change nothing, both
  // kinds of syncs up to the first renaming.
  enum class Lie { kNone, kSync, kSyncDirectory, kRewrite, kSyncBeforeRename };

  explicit CrashFileSystem(const DiskImage& disk = {},
                           int64_t page_bytes = 512);

  // May be called for several calls; `call` counts as calls() does.
  void FailAt(int64_t call, Fault fault);
  // No more faults; after kKill this is the next process, which finds what was
  // written, synced or not.
  void Revive();
  // Of every call, or of the one call (counted as calls() does).
  void TellLie(Lie lie, int64_t call = 0);
  // As on a file system that cannot exchange, or give a file two names.
  void set_can_exchange(bool can_exchange);
  void set_can_link(bool can_link);
  // Are called in each sync of a file, before it takes effect and after.
  void set_before_sync(std::function<void()> before_sync);
  void set_after_sync(std::function<void()> after_sync);

  int64_t calls() const;
  int64_t syncs() const;  // of files
  // Those that have happened.
  int64_t faults() const;
  // Whether one of them was kKill.
  bool dead() const;
  // Changes and syncs up to now. A power loss comes after one of them.
  int64_t num_events() const;

  // What processes see.
  DiskImage Latest() const;
  // Calls `check` with disks that a power loss after `events` events may leave:
  // with all of them if they are at most `limit`, else with `limit` drawn by
  // `seed`, the emptiest and the fullest among them. Equal ones once. Returns
  // how many there were.
  int64_t ForEachPowerLoss(
      int64_t events, int64_t limit, uint64_t seed,
      const std::function<void(const DiskImage&)>& check) const;

 protected:
  int CallOpen(const std::string& path, Access access,
               std::unique_ptr<File>* file) override;
  int CallCreate(const std::string& path, int mode,
                 std::unique_ptr<File>* file) override;
  int CallMakeDirectory(const std::string& path, int mode) override;
  int CallRename(const std::string& from, const std::string& to) override;
  int CallExchange(const std::string& one, const std::string& other) override;
  int CallLink(const std::string& file, const std::string& name) override;
  int CallRemove(const std::string& path) override;
  int CallList(const std::string& directory,
               std::vector<std::string>* names) override;
  int CallSyncDirectory(const std::string& path) override;
  int CallStat(const std::string& path, Info* info) override;
  int64_t CallFreeBytes(const std::string& path) override;

 private:
  class OpenFile;
  // Kinds of calls, by how they can fail.
  enum class Kind { kRead, kMake, kWrite, kSync, kOther };

  // Counts a call, with mutex_ held: 0, or the -errno with which it fails.
  int Begin(Kind kind);
  void Record(DiskEvent event);
  bool Lies(Lie lie) const;
  // The number of the file, or -errno.
  int Find(const std::string& path) const;

  const int64_t page_bytes_;
  const DiskImage start_;
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  CrashDisk now_;
  std::vector<DiskEvent> events_;
  std::function<void()> before_sync_, after_sync_;
  int64_t calls_ = 0, syncs_ = 0;
  std::map<int64_t, Fault> fault_at_;
  int64_t faults_ = 0;
  bool dead_ = false;  // after kKill
  bool full_ = false;  // after kShortWrite: the next write fails
  bool renamed_ = false;
  bool can_exchange_ = true, can_link_ = true;
  Lie lie_ = Lie::kNone;
  int64_t lie_call_ = 0;
};

}  // namespace gradwire
