// SPDX-License-Identifier: Apache-2.0
// The way of durable code to files. One interface, so that the same code runs
// on a disk (PosixFileSystem) and on a model of one that fails and loses power
// on request (checkpoint/crash_file_system.h).
//
// The public methods hold what every implementation owes its callers: short
// writes are continued, interrupted calls repeated, failures have a reason, and
// a failed sync is final. Implementations supply the bare calls below them.
//
// Errors of all methods, with the metadata path, operation and errno:
//   NOT_FOUND FILE_NOT_FOUND, ALREADY_EXISTS FILE_EXISTS;
//   RESOURCE_EXHAUSTED STORAGE_FULL (needed and free, in bytes): nothing was
//     lost, try again when there is space;
//   RESOURCE_EXHAUSTED SYSTEM_LIMIT: out of descriptors or of memory;
//   UNAVAILABLE STORAGE_IO: everything else that the system reports.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace gradwire {

// One open file; closed by the destructor, which syncs nothing.
//
// Thread rule: any method from any thread; writes of the same bytes, and
// Append, one at a time.
class File {
 public:
  virtual ~File() = default;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }

  // Writes all of `bytes`. After an error any part of them may be there.
  absl::Status WriteAt(int64_t offset, std::string_view bytes);
  // WriteAt the end of the file.
  absl::Status Append(std::string_view bytes);
  // The number of bytes read to `out`: fewer than `bytes` only where the file
  // ends.
  absl::StatusOr<int64_t> ReadAt(int64_t offset, int64_t bytes, char* out);

  // Returns once everything written before is on the disk: Sync what is needed
  // to read it back (fdatasync), SyncAll the times of the file as well (fsync).
  //
  // A failed sync is final: the system may since have dropped what it could not
  // write and would report success the next time. This and every later write,
  // truncation and sync of this object return its error.
  absl::Status Sync();
  absl::Status SyncAll();
  // Makes a later Sync shorter: the system begins to write the range now. Only
  // advice; what goes wrong is found by Sync.
  void StartWriteBack(int64_t offset, int64_t bytes);
  absl::Status Truncate(int64_t bytes);
  absl::StatusOr<int64_t> Size();

 protected:
  explicit File(std::string path) : path_(std::move(path)) {}

  // The system's calls: what they return, or -errno. None is repeated below.
  virtual int64_t CallWrite(int64_t offset, std::string_view bytes) = 0;
  virtual int64_t CallRead(int64_t offset, int64_t bytes, char* out) = 0;
  virtual int CallSync(bool all) = 0;
  virtual void CallStartWriteBack(int64_t offset, int64_t bytes) = 0;
  virtual int CallTruncate(int64_t bytes) = 0;
  virtual int64_t CallSize() = 0;
  virtual int64_t CallFreeBytes() = 0;

 private:
  absl::Status SyncOnce(bool all);
  absl::Status Failure(int error, const char* operation, int64_t needed);
  absl::Status failed_sync();

  const std::string path_;
  std::mutex sync_mutex_;  // held while syncing; before mutex_
  std::mutex mutex_;
  absl::Status failed_sync_;  // guarded by mutex_
};

// Paths are the system's. Thread rule: any method from any thread.
class FileSystem {
 public:
  enum class Access { kRead, kReadWrite };
  struct Info {
    bool is_directory = false;
    int64_t bytes = 0;
  };

  virtual ~FileSystem() = default;

  // A new, empty file, for reading and writing. It outlasts a power loss only
  // after SyncDirectory of its directory.
  absl::StatusOr<std::unique_ptr<File>> Create(const std::string& path,
                                               int mode = 0600);
  absl::StatusOr<std::unique_ptr<File>> Open(const std::string& path,
                                             Access access);
  absl::Status MakeDirectory(const std::string& path, int mode = 0700);
  // Puts a file in the place of another, or of none, at once; a directory, with
  // what is in it, in the place of an empty one, or of none.
  absl::Status Rename(const std::string& from, const std::string& to);
  // Puts each of two names that are there in the other's place, at once. False:
  // this file system cannot, and nothing has happened.
  absl::StatusOr<bool> Exchange(const std::string& one,
                                const std::string& other);
  // Gives a file a second name, which keeps it when the first is removed.
  // False: as in Exchange.
  absl::StatusOr<bool> Link(const std::string& file, const std::string& name);
  // A file, or an empty directory.
  absl::Status Remove(const std::string& path);
  // Names without "." and "..", in ascending order.
  absl::StatusOr<std::vector<std::string>> List(const std::string& directory);
  // Returns once every creation, renaming and removal in it is on the disk.
  // After an error nobody knows which of them are, nor will by trying again.
  absl::Status SyncDirectory(const std::string& path);
  absl::StatusOr<Info> Stat(const std::string& path);
  // What an unprivileged process may still write to the volume of `path`.
  absl::StatusOr<int64_t> FreeBytes(const std::string& path);

 protected:
  friend class FencedFiles;

  // Asked before a name is made, changed or removed, which fails with its
  // error.
  virtual absl::Status MayChange() { return absl::OkStatus(); }
  // As in File.
  virtual int CallOpen(const std::string& path, Access access,
                       std::unique_ptr<File>* file) = 0;
  virtual int CallCreate(const std::string& path, int mode,
                         std::unique_ptr<File>* file) = 0;
  virtual int CallMakeDirectory(const std::string& path, int mode) = 0;
  virtual int CallRename(const std::string& from, const std::string& to) = 0;
  // -EINVAL, -ENOSYS, -EOPNOTSUPP or, of links, -EPERM, -EXDEV, -EMLINK: not
  // here.
  virtual int CallExchange(const std::string& one,
                           const std::string& other) = 0;
  virtual int CallLink(const std::string& file, const std::string& name) = 0;
  virtual int CallRemove(const std::string& path) = 0;
  virtual int CallList(const std::string& directory,
                       std::vector<std::string>* names) = 0;
  virtual int CallSyncDirectory(const std::string& path) = 0;
  virtual int CallStat(const std::string& path, Info* info) = 0;
  virtual int64_t CallFreeBytes(const std::string& path) = 0;

 private:
  // OK for `result` >= 0.
  absl::Status Outcome(int64_t result, const std::string& path,
                       const char* operation);
};

// The machine's files. Symbolic links at the end of a path are not followed.
FileSystem& PosixFileSystem();

// Makes `path` and the directories above it that are missing, each of which
// outlasts a power loss. Two may do so at once.
absl::Status MakeDirectories(FileSystem& files, const std::string& path,
                             int mode = 0700);

// Removes a directory of files. If that is interrupted, part of it remains.
absl::Status RemoveDirectory(FileSystem& files, const std::string& path);
// A file or a directory of files, or nothing.
absl::Status RemoveIfThere(FileSystem& files, const std::string& path);

// The directory of `path`: "/" of "/a", "." of "a".
std::string DirectoryOf(const std::string& path);

}  // namespace gradwire
