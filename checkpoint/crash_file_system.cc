// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/crash_file_system.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace gradwire {

class CrashFileSystem::OpenFile : public File {
 public:
  OpenFile(const std::string& path, int number, CrashFileSystem* files)
      : File(path), number_(number), files_(*files) {}

 protected:
  int64_t CallWrite(int64_t offset, std::string_view bytes) override {
    std::lock_guard<std::mutex> lock(files_.mutex_);
    if (int error = files_.Begin(Kind::kWrite); error < 0) return error;
    // Of a short write, Begin has said so.
    if (files_.full_) bytes = bytes.substr(0, (bytes.size() + 1) / 2);
    const std::string& content = files_.now_.content(number_);
    if (files_.Lies(Lie::kRewrite) && offset <= std::ssize(content) &&
        content.compare(static_cast<size_t>(offset), bytes.size(), bytes) ==
            0) {
      return std::ssize(bytes);
    }
    files_.Record({.kind = DiskEvent::Kind::kWrite,
                   .file = number_,
                   .offset = offset,
                   .bytes = std::string(bytes)});
    return std::ssize(bytes);
  }
  int64_t CallRead(int64_t offset, int64_t bytes, char* out) override {
    std::lock_guard<std::mutex> lock(files_.mutex_);
    if (int error = files_.Begin(Kind::kRead); error < 0) return error;
    const std::string& content = files_.now_.content(number_);
    const int64_t left = std::ssize(content) - offset;
    const int64_t got = std::clamp<int64_t>(left, 0, bytes);
    if (got > 0) memcpy(out, content.data() + offset, static_cast<size_t>(got));
    return got;
  }
  int CallSync(bool) override {
    std::function<void()> before_sync, after_sync;
    {
      std::lock_guard<std::mutex> lock(files_.mutex_);
      before_sync = files_.before_sync_;
      after_sync = files_.after_sync_;
    }
    if (before_sync) before_sync();
    const int result = SyncNow();
    if (after_sync) after_sync();
    return result;
  }
  void CallStartWriteBack(int64_t, int64_t) override {}
  int CallTruncate(int64_t bytes) override {
    std::lock_guard<std::mutex> lock(files_.mutex_);
    if (int error = files_.Begin(Kind::kOther); error < 0) return error;
    files_.Record(
        {.kind = DiskEvent::Kind::kTruncate, .file = number_, .offset = bytes});
    return 0;
  }
  int64_t CallSize() override {
    std::lock_guard<std::mutex> lock(files_.mutex_);
    if (int error = files_.Begin(Kind::kRead); error < 0) return error;
    return std::ssize(files_.now_.content(number_));
  }
  int64_t CallFreeBytes() override { return 0; }

 private:
  int SyncNow() {
    std::lock_guard<std::mutex> lock(files_.mutex_);
    const int error = files_.Begin(Kind::kSync);
    ++files_.syncs_;
    if (files_.dead_ || (error == 0 && files_.Lies(Lie::kSync))) return error;
    files_.Record({.kind = error < 0 ? DiskEvent::Kind::kFailedSync
                                     : DiskEvent::Kind::kSync,
                   .file = number_});
    return error;
  }

  const int number_;
  CrashFileSystem& files_;
};

CrashFileSystem::CrashFileSystem(const DiskImage& disk, int64_t page_bytes)
    : page_bytes_(page_bytes), start_(disk), now_(disk, page_bytes) {}

void CrashFileSystem::FailAt(int64_t call, Fault fault) {
  std::lock_guard<std::mutex> lock(mutex_);
  fault_at_[call] = fault;
}

void CrashFileSystem::Revive() {
  std::lock_guard<std::mutex> lock(mutex_);
  fault_at_.clear();
  dead_ = full_ = false;
}

void CrashFileSystem::TellLie(Lie lie, int64_t call) {
  std::lock_guard<std::mutex> lock(mutex_);
  lie_ = lie;
  lie_call_ = call;
}

void CrashFileSystem::set_can_exchange(bool can_exchange) {
  std::lock_guard<std::mutex> lock(mutex_);
  can_exchange_ = can_exchange;
}

void CrashFileSystem::set_can_link(bool can_link) {
  std::lock_guard<std::mutex> lock(mutex_);
  can_link_ = can_link;
}

void CrashFileSystem::set_before_sync(std::function<void()> before_sync) {
  std::lock_guard<std::mutex> lock(mutex_);
  before_sync_ = std::move(before_sync);
}

void CrashFileSystem::set_after_sync(std::function<void()> after_sync) {
  std::lock_guard<std::mutex> lock(mutex_);
  after_sync_ = std::move(after_sync);
}

int64_t CrashFileSystem::calls() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return calls_;
}

int64_t CrashFileSystem::syncs() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return syncs_;
}

int64_t CrashFileSystem::faults() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return faults_;
}

bool CrashFileSystem::dead() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return dead_;
}

int64_t CrashFileSystem::num_events() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::ssize(events_);
}

DiskImage CrashFileSystem::Latest() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return now_.Latest();
}

int64_t CrashFileSystem::ForEachPowerLoss(
    int64_t events, int64_t limit, uint64_t seed,
    const std::function<void(const DiskImage&)>& check) const {
  CrashDisk disk(start_, page_bytes_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = 0; i < events; ++i) {
      disk.Apply(events_[static_cast<size_t>(i)]);
    }
  }
  return disk.ForEachPowerLoss(limit, seed, check);
}

int CrashFileSystem::Begin(Kind kind) {
  ++calls_;
  if (dead_) return -EIO;
  if (full_ && kind == Kind::kWrite) {
    full_ = false;
    return -ENOSPC;
  }
  const auto fault = fault_at_.find(calls_);
  if (fault == fault_at_.end()) return 0;
  const bool grows =
      kind == Kind::kMake || kind == Kind::kWrite || kind == Kind::kSync;
  switch (fault->second) {
    case Fault::kKill:
      ++faults_;
      dead_ = true;
      return -EIO;
    case Fault::kNoSpace:
      if (!grows) return 0;
      ++faults_;
      return -ENOSPC;
    case Fault::kIoError:
      ++faults_;
      return -EIO;
    case Fault::kShortWrite:
      if (kind != Kind::kWrite) return 0;
      ++faults_;
      full_ = true;
      return 0;
  }
  return 0;
}

void CrashFileSystem::Record(DiskEvent event) {
  now_.Apply(event);
  events_.push_back(std::move(event));
}

bool CrashFileSystem::Lies(Lie lie) const {
  if (lie_ == Lie::kSyncBeforeRename) {
    return !renamed_ && (lie == Lie::kSync || lie == Lie::kSyncDirectory);
  }
  return lie_ == lie && (lie_call_ == 0 || lie_call_ == calls_);
}

int CrashFileSystem::Find(const std::string& path) const {
  const auto found = now_.names().find(path);
  if (found == now_.names().end()) return -ENOENT;
  return found->second < 0 ? -EISDIR : found->second;
}

int CrashFileSystem::CallOpen(const std::string& path, Access,
                              std::unique_ptr<File>* file) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kRead); error < 0) return error;
  const int number = Find(path);
  if (number < 0) return number;
  *file = std::make_unique<OpenFile>(path, number, this);
  return 0;
}

int CrashFileSystem::CallCreate(const std::string& path, int,
                                std::unique_ptr<File>* file) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kMake); error < 0) return error;
  if (now_.names().contains(path)) return -EEXIST;
  const std::string directory = DirectoryOf(path);
  if (directory != "/" && Find(directory) != -EISDIR) return -ENOENT;
  const int number = now_.num_files();
  Record({.kind = DiskEvent::Kind::kLink, .file = number, .path = path});
  *file = std::make_unique<OpenFile>(path, number, this);
  return 0;
}

int CrashFileSystem::CallMakeDirectory(const std::string& path, int) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kMake); error < 0) return error;
  if (path == "/" || now_.names().contains(path)) return -EEXIST;
  const std::string directory = DirectoryOf(path);
  if (directory != "/" && Find(directory) != -EISDIR) return -ENOENT;
  Record({.kind = DiskEvent::Kind::kLink, .path = path});
  return 0;
}

int CrashFileSystem::CallRename(const std::string& from,
                                const std::string& to) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kMake); error < 0) return error;
  const int number = Find(from), replaced = Find(to);
  if (number == -ENOENT) return -ENOENT;
  if (number >= 0 && replaced == -EISDIR) return -EISDIR;
  if (number == -EISDIR) {
    if (replaced >= 0) return -ENOTDIR;
    for (const auto& [name, at] : now_.names()) {
      if (DirectoryOf(name) == to) return -ENOTEMPTY;
    }
  }
  renamed_ = true;
  Record({.kind = DiskEvent::Kind::kRename,
          .file = number == -EISDIR ? -1 : number,
          .path = from,
          .to = to});
  return 0;
}

int CrashFileSystem::CallExchange(const std::string& one,
                                  const std::string& other) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kMake); error < 0) return error;
  if (!can_exchange_) return -EINVAL;
  for (const std::string& path : {one, other}) {
    if (const int number = Find(path); number != -EISDIR) {
      return number < 0 ? number : -ENOTDIR;
    }
  }
  renamed_ = true;
  Record({.kind = DiskEvent::Kind::kExchange, .path = one, .to = other});
  return 0;
}

int CrashFileSystem::CallLink(const std::string& file,
                              const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kMake); error < 0) return error;
  const int number = Find(file);
  if (number == -ENOENT) return -ENOENT;
  if (!can_link_ || number < 0) return -EPERM;
  if (now_.names().contains(name)) return -EEXIST;
  const std::string directory = DirectoryOf(name);
  if (directory != "/" && Find(directory) != -EISDIR) return -ENOENT;
  Record({.kind = DiskEvent::Kind::kLink, .file = number, .path = name});
  return 0;
}

int CrashFileSystem::CallRemove(const std::string& path) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kOther); error < 0) return error;
  if (!now_.names().contains(path)) return -ENOENT;
  for (const auto& [name, number] : now_.names()) {
    if (DirectoryOf(name) == path) return -ENOTEMPTY;
  }
  Record({.kind = DiskEvent::Kind::kUnlink, .path = path});
  return 0;
}

int CrashFileSystem::CallList(const std::string& directory,
                              std::vector<std::string>* names) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kRead); error < 0) return error;
  if (directory != "/" && Find(directory) != -EISDIR) return -ENOENT;
  names->clear();
  for (const auto& [path, number] : now_.names()) {
    if (DirectoryOf(path) != directory) continue;
    names->push_back(path.substr(path.find_last_of('/') + 1));
  }
  return 0;
}

int CrashFileSystem::CallSyncDirectory(const std::string& path) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kOther); error < 0) return error;
  if (path != "/" && Find(path) != -EISDIR) return -ENOENT;
  if (Lies(Lie::kSyncDirectory)) return 0;
  Record({.kind = DiskEvent::Kind::kSyncDirectory, .path = path});
  return 0;
}

int CrashFileSystem::CallStat(const std::string& path, Info* info) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int error = Begin(Kind::kRead); error < 0) return error;
  const int number = path == "/" ? -EISDIR : Find(path);
  if (number < 0 && number != -EISDIR) return number;
  info->is_directory = number == -EISDIR;
  info->bytes = number < 0 ? 0 : std::ssize(now_.content(number));
  return 0;
}

// It is full from a chosen call on, whatever it says before.
int64_t CrashFileSystem::CallFreeBytes(const std::string&) {
  return int64_t{1} << 40;
}

}  // namespace gradwire
