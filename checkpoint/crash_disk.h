// SPDX-License-Identifier: Apache-2.0
// What a disk may hold after a power loss: the model of
// checkpoint/crash_file_system.h, without calls and faults.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace gradwire {

// Paths begin with "/", which is always there.
struct DiskImage {
  std::map<std::string, std::string> files = {};  // path -> content
  std::set<std::string> directories = {};

  bool operator==(const DiskImage&) const = default;
};

struct DiskEvent {
  enum class Kind {
    kWrite,
    kTruncate,
    kSync,
    kFailedSync,
    kLink,  // of a file, new or not, or of a directory
    kUnlink,
    kRename,
    kExchange,  // of two directories
    kSyncDirectory,
  };
  Kind kind;
  int file = -1;           // of a write, truncation, sync, link or renaming;
                           // -1: a directory
  int64_t offset = 0;      // of a write; of a truncation the new length
  std::string bytes = {};  // of a write
  std::string path = {};   // of a change of names
  std::string to = {};     // of a renaming or an exchange
};

// Something on the disk that has been changed and perhaps not yet synced.
template <typename T>
class Uncertain {
 public:
  explicit Uncertain(T value) : versions_{std::move(value)} {}

  const T& latest() const { return versions_.back(); }
  // One of these is on the disk.
  const std::vector<T>& versions() const { return versions_; }

  void Set(T value) {
    changed_ = true;
    if (value != latest()) versions_.push_back(std::move(value));
  }
  void Synced() {
    if (!forgotten_ || changed_) {
      versions_ = {latest()};
      forgotten_ = false;
    }
    changed_ = false;
  }
  void SyncFailed() {
    forgotten_ = versions_.size() > 1;
    changed_ = false;
  }

 private:
  std::vector<T> versions_;
  bool changed_ = false;
  // A sync that failed was to write it: another will not.
  bool forgotten_ = false;
};

class CrashDisk {
 public:
  CrashDisk(const DiskImage& start, int64_t page_bytes);

  void Apply(const DiskEvent& event);

  // What processes see: files by number, -1 for directories.
  const std::map<std::string, int>& names() const { return names_; }
  int num_files() const { return static_cast<int>(files_.size()); }
  const std::string& content(int file) const {
    return files_[static_cast<size_t>(file)].content;
  }
  DiskImage Latest() const;

  // See CrashFileSystem.
  int64_t ForEachPowerLoss(
      int64_t limit, uint64_t seed,
      const std::function<void(const DiskImage&)>& check) const;

 private:
  struct File {
    std::string content;  // as processes see it
    Uncertain<int64_t> length{0};
    std::vector<Uncertain<std::string>> pages;
  };
  using Names = std::map<std::string, int>;
  // A number of versions and, filled in by the caller, the one that is chosen.
  struct Choice {
    int64_t versions = 1;
    int64_t chosen = 0;
  };

  static void Change(const DiskEvent& event, Names& names);
  void SyncDirectory(const std::string& path);
  static DiskImage Image(const Names& names,
                         const std::function<std::string(int)>& content);
  File& file(int number) { return files_[static_cast<size_t>(number)]; }
  void Write(File& file, int64_t offset, const std::string& bytes);
  void Truncate(File& file, int64_t length);
  void SetPages(File& file, int64_t begin, int64_t end);
  std::vector<Choice> Choices() const;
  DiskImage Chosen(const std::vector<Choice>& choices) const;

  const int64_t page_bytes_;
  std::vector<File> files_;
  Names names_, synced_names_;
  std::vector<DiskEvent> unsynced_changes_;  // of names
};

}  // namespace gradwire
