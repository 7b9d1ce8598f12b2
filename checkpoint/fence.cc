// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/fence.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "base/error.h"
#include "base/status.h"

namespace gradwire {

absl::StatusOr<int64_t> HighestEpoch(FileSystem& files,
                                     const std::string& directory) {
  const auto names = files.List(directory);
  if (absl::IsNotFound(names.status())) return 0;
  GW_RETURN_IF_ERROR(names.status());
  int64_t highest = 0;
  for (const std::string& name : *names) {
    int64_t epoch = 0;
    // What else lies there is none.
    if (absl::SimpleAtoi(name, &epoch)) highest = std::max(highest, epoch);
  }
  return highest;
}

absl::Status EpochFenced(int64_t epoch, int64_t highest) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "EPOCH_FENCED")
      .Server()
      .With("epoch", epoch)
      .With("highest", highest)
      .Message(
          "Another server has taken over this state directory. Stop this one.");
}

absl::Status CheckEpoch(FileSystem& files, const std::string& directory,
                        int64_t epoch) {
  GW_ASSIGN_OR_RETURN(const int64_t highest, HighestEpoch(files, directory));
  return highest <= epoch ? absl::OkStatus() : EpochFenced(epoch, highest);
}

absl::Status RaiseEpoch(FileSystem& files, const std::string& directory,
                        int64_t epoch) {
  GW_RETURN_IF_ERROR(MakeDirectories(files, directory));
  const std::string path = directory + "/" + std::to_string(epoch);
  const auto made = files.Create(path);
  if (!absl::IsAlreadyExists(made.status())) {
    GW_RETURN_IF_ERROR(made.status());
  }
  GW_RETURN_IF_ERROR(files.SyncDirectory(directory));
  GW_RETURN_IF_ERROR(CheckEpoch(files, directory, epoch));
  GW_ASSIGN_OR_RETURN(const auto names, files.List(directory));
  for (const std::string& name : names) {
    int64_t other = 0;
    // One that stays is lower, and fences nobody else.
    if (absl::SimpleAtoi(name, &other) && other < epoch) {
      (void)files.Remove(directory + "/" + name);
    }
  }
  return absl::OkStatus();
}

// Reaches the calls of `base` as its friend.
class FencedFiles : public FileSystem {
 public:
  FencedFiles(FileSystem& base, std::string directory, int64_t epoch)
      : base_(base), directory_(std::move(directory)), epoch_(epoch) {}

 protected:
  absl::Status MayChange() override {
    return CheckEpoch(base_, directory_, epoch_);
  }
  int CallOpen(const std::string& path, Access access,
               std::unique_ptr<File>* file) override {
    return base_.CallOpen(path, access, file);
  }
  int CallCreate(const std::string& path, int mode,
                 std::unique_ptr<File>* file) override {
    return base_.CallCreate(path, mode, file);
  }
  int CallMakeDirectory(const std::string& path, int mode) override {
    return base_.CallMakeDirectory(path, mode);
  }
  int CallRename(const std::string& from, const std::string& to) override {
    return base_.CallRename(from, to);
  }
  int CallExchange(const std::string& one, const std::string& other) override {
    return base_.CallExchange(one, other);
  }
  int CallLink(const std::string& file, const std::string& name) override {
    return base_.CallLink(file, name);
  }
  int CallRemove(const std::string& path) override {
    return base_.CallRemove(path);
  }
  int CallList(const std::string& directory,
               std::vector<std::string>* names) override {
    return base_.CallList(directory, names);
  }
  int CallSyncDirectory(const std::string& path) override {
    return base_.CallSyncDirectory(path);
  }
  int CallStat(const std::string& path, Info* info) override {
    return base_.CallStat(path, info);
  }
  int64_t CallFreeBytes(const std::string& path) override {
    return base_.CallFreeBytes(path);
  }

 private:
  FileSystem& base_;
  const std::string directory_;
  const int64_t epoch_;
};

std::unique_ptr<FileSystem> FencedFileSystem(FileSystem& base,
                                             const std::string& directory,
                                             int64_t epoch) {
  return std::make_unique<FencedFiles>(base, directory, epoch);
}

}  // namespace gradwire
