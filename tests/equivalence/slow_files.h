// SPDX-License-Identifier: Apache-2.0
// The machine's files, of which writing takes as long as a test wants, or ends.
#pragma once

#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "base/error.h"
#include "checkpoint/file_system.h"

namespace gradwire {

class SlowFiles : public FileSystem {
 public:
  // Called before every write; returns 0, or the errno that it fails with.
  explicit SlowFiles(std::function<int()> before_write)
      : before_write_(std::move(before_write)) {}

 private:
  static int Errno(const absl::Status& status) {
    if (status.ok()) return 0;
    int error = EIO;
    const auto detail = GetErrorDetail(status);
    if (detail && detail->metadata.count("errno") > 0) {
      (void)absl::SimpleAtoi(detail->metadata.at("errno"), &error);
    }
    return -error;
  }

  class SlowFile : public File {
   public:
    SlowFile(std::unique_ptr<File> file, const SlowFiles& files)
        : File(file->path()), file_(std::move(file)), files_(files) {}

   private:
    int64_t CallWrite(int64_t offset, std::string_view bytes) override {
      if (const int error = files_.before_write_(); error != 0) return -error;
      const absl::Status status = file_->WriteAt(offset, bytes);
      return status.ok() ? std::ssize(bytes) : Errno(status);
    }
    int64_t CallRead(int64_t offset, int64_t bytes, char* out) override {
      const auto read = file_->ReadAt(offset, bytes, out);
      return read.ok() ? *read : Errno(read.status());
    }
    int CallSync(bool) override { return Errno(file_->Sync()); }
    void CallStartWriteBack(int64_t, int64_t) override {}
    int CallTruncate(int64_t bytes) override {
      return Errno(file_->Truncate(bytes));
    }
    int64_t CallSize() override {
      const auto size = file_->Size();
      return size.ok() ? *size : Errno(size.status());
    }
    int64_t CallFreeBytes() override { return 0; }

    const std::unique_ptr<File> file_;
    const SlowFiles& files_;
  };

  int Wrap(absl::StatusOr<std::unique_ptr<File>> made,
           std::unique_ptr<File>* file) {
    if (made.ok()) *file = std::make_unique<SlowFile>(*std::move(made), *this);
    return Errno(made.status());
  }
  int CallOpen(const std::string& path, Access access,
               std::unique_ptr<File>* file) override {
    return Wrap(files_.Open(path, access), file);
  }
  int CallCreate(const std::string& path, int mode,
                 std::unique_ptr<File>* file) override {
    return Wrap(files_.Create(path, mode), file);
  }
  int CallMakeDirectory(const std::string& path, int mode) override {
    return Errno(files_.MakeDirectory(path, mode));
  }
  int CallRename(const std::string& from, const std::string& to) override {
    return Errno(files_.Rename(from, to));
  }
  int CallExchange(const std::string& one, const std::string& other) override {
    const auto exchanged = files_.Exchange(one, other);
    if (!exchanged.ok()) return Errno(exchanged.status());
    return *exchanged ? 0 : -EINVAL;
  }
  int CallLink(const std::string& file, const std::string& name) override {
    const auto linked = files_.Link(file, name);
    if (!linked.ok()) return Errno(linked.status());
    return *linked ? 0 : -EPERM;
  }
  int CallRemove(const std::string& path) override {
    return Errno(files_.Remove(path));
  }
  int CallList(const std::string& directory,
               std::vector<std::string>* names) override {
    auto list = files_.List(directory);
    if (list.ok()) *names = *std::move(list);
    return Errno(list.status());
  }
  int CallSyncDirectory(const std::string& path) override {
    return Errno(files_.SyncDirectory(path));
  }
  int CallStat(const std::string& path, Info* info) override {
    const auto stat = files_.Stat(path);
    if (stat.ok()) *info = *stat;
    return Errno(stat.status());
  }
  int64_t CallFreeBytes(const std::string& path) override {
    const auto free = files_.FreeBytes(path);
    return free.ok() ? *free : Errno(free.status());
  }

  FileSystem& files_ = PosixFileSystem();
  const std::function<int()> before_write_;
};

}  // namespace gradwire
