// SPDX-License-Identifier: Apache-2.0
// Files that are only read: what checkpoint/crash_file_system.h keeps of each,
// for a power loss, takes as long as to read it.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/file_system.h"

namespace gradwire {

class MemoryFiles : public FileSystem {
 public:
  // Path -> content. Their directories are there, and no others.
  explicit MemoryFiles(std::map<std::string, std::string> files)
      : files_(std::move(files)) {}

 protected:
  int CallOpen(const std::string& path, Access access,
               std::unique_ptr<File>* file) override {
    if (access != Access::kRead) return -EROFS;
    const auto found = files_.find(path);
    if (found == files_.end()) return IsDirectory(path) ? -EISDIR : -ENOENT;
    *file = std::make_unique<OpenFile>(path, found->second);
    return 0;
  }
  int CallCreate(const std::string&, int, std::unique_ptr<File>*) override {
    return -EROFS;
  }
  int CallMakeDirectory(const std::string&, int) override { return -EROFS; }
  int CallRename(const std::string&, const std::string&) override {
    return -EROFS;
  }
  int CallExchange(const std::string&, const std::string&) override {
    return -EROFS;
  }
  int CallLink(const std::string&, const std::string&) override {
    return -EROFS;
  }
  int CallRemove(const std::string&) override { return -EROFS; }
  int CallList(const std::string& directory,
               std::vector<std::string>* names) override {
    if (!IsDirectory(directory)) return -ENOENT;
    names->clear();
    for (const auto& [path, content] : files_) {
      if (DirectoryOf(path) != directory) continue;
      names->push_back(path.substr(path.find_last_of('/') + 1));
    }
    return 0;
  }
  int CallSyncDirectory(const std::string&) override { return -EROFS; }
  int CallStat(const std::string& path, Info* info) override {
    const auto found = files_.find(path);
    info->is_directory = found == files_.end();
    if (info->is_directory) return IsDirectory(path) ? 0 : -ENOENT;
    info->bytes = std::ssize(found->second);
    return 0;
  }
  int64_t CallFreeBytes(const std::string&) override { return 0; }

 private:
  class OpenFile : public File {
   public:
    OpenFile(const std::string& path, std::string_view content)
        : File(path), content_(content) {}

   protected:
    int64_t CallWrite(int64_t, std::string_view) override { return -EROFS; }
    int64_t CallRead(int64_t offset, int64_t bytes, char* out) override {
      const int64_t left = std::ssize(content_) - offset;
      const int64_t got = std::clamp<int64_t>(left, 0, bytes);
      if (got == 0) return 0;
      memcpy(out, content_.data() + offset, static_cast<size_t>(got));
      return got;
    }
    int CallSync(bool) override { return -EROFS; }
    void CallStartWriteBack(int64_t, int64_t) override {}
    int CallTruncate(int64_t) override { return -EROFS; }
    int64_t CallSize() override { return std::ssize(content_); }
    int64_t CallFreeBytes() override { return 0; }

   private:
    const std::string_view content_;
  };

  bool IsDirectory(const std::string& path) const {
    const auto within = files_.lower_bound(path + "/");
    return within != files_.end() && within->first.starts_with(path + "/");
  }

  const std::map<std::string, std::string> files_;
};

}  // namespace gradwire
