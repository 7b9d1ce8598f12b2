// SPDX-License-Identifier: Apache-2.0
#include "server/state_dir.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "absl/strings/numbers.h"
#include "base/error.h"
#include "base/status.h"
#include "checkpoint/file_system.h"
#include "checkpoint/remote/remote_checkpoints.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

namespace fs = std::filesystem;

// Of sockaddr_un.sun_path, with some to spare.
constexpr size_t kMaxSocketPath = 100;

absl::Status Unusable(const std::string& what, int error) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "STATE_DIR_UNUSABLE")
      .Server()
      .With("errno", error)
      .Message("The state directory cannot be used: " + what + ": " +
               strerror(error) + ". Give another --state_dir.");
}

// What can be read of a directory; none is as good as empty.
std::vector<fs::path> Entries(const fs::path& directory) {
  std::vector<fs::path> entries;
  std::error_code failure;
  fs::directory_iterator it(directory, failure);
  for (; !failure && it != fs::end(it); it.increment(failure)) {
    entries.push_back(it->path());
  }
  return entries;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StateDir>> StateDir::Open(
    const std::string& path) {
  std::error_code failure;
  // A slash at the end hides from create_directories what it has made.
  const std::string given = path.substr(0, path.find_last_not_of('/') + 1);
  const bool made =
      fs::create_directories(given.empty() ? "/" : given, failure);
  if (failure) return Unusable("it cannot be made", failure.value());
  std::unique_ptr<StateDir> dir(new StateDir);
  dir->path_ = fs::canonical(path, failure).string();
  if (failure) return Unusable("it cannot be found", failure.value());
  // One that was there has the permissions that its owner gave it.
  if (made) chmod(dir->path_.c_str(), 0700);
  const std::string lock = dir->path_ + "/LOCK";
  dir->lock_fd_ = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (dir->lock_fd_ < 0) return Unusable("its lock cannot be made", errno);
  if (flock(dir->lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    char pid[32] = {};
    const ssize_t read = pread(dir->lock_fd_, pid, sizeof(pid) - 1, 0);
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "STATE_DIR_LOCKED")
        .Server()
        .With("pid", read > 0 ? std::string(pid) : "unknown")
        .Message("Another gradwired (pid " +
                 (read > 0 ? std::string(pid) : "unknown") +
                 ") uses this state directory. Stop it, or give another "
                 "--state_dir.");
  }
  const std::string pid = std::to_string(getpid());
  if (ftruncate(dir->lock_fd_, 0) != 0 ||
      pwrite(dir->lock_fd_, pid.data(), pid.size(), 0) < 0) {
    return Unusable("its lock cannot be written", errno);
  }
  fs::create_directories(dir->jobs(), failure);
  if (failure) return Unusable("its jobs cannot be made", failure.value());
  // On a full disk it is for what comes now.
  unlink(dir->reserve().c_str());
  return dir;
}

absl::Status StateDir::PlaceSocket(int64_t epoch) {
  for (const fs::path& each : Entries(path_)) {
    const std::string stem = each.stem().string();
    int64_t other = 0;
    if (each.extension() == ".sock" && stem.starts_with("ranks-") &&
        absl::SimpleAtoi(stem.substr(6), &other) && other <= epoch) {
      unlink(each.c_str());
    }
  }
  // Of older versions.
  unlink((path_ + "/ranks.sock").c_str());
  const std::string name = "/ranks-" + std::to_string(epoch) + ".sock";
  socket_ = path_ + name;
  if (socket_.size() > kMaxSocketPath) {
    char folder[] = "/tmp/gradwire-XXXXXX";
    if (mkdtemp(folder) == nullptr) {
      return Unusable("there is no place for its socket", errno);
    }
    socket_dir_ = folder;
    socket_ = socket_dir_ + name;
  }
  return absl::OkStatus();
}

absl::Status StateDir::RemoveLeftovers(FileSystem& files) const {
  GW_RETURN_IF_ERROR(RecoverSnapshots(files, path_ + "/models"));
  for (const fs::path& job : Entries(jobs())) {
    GW_RETURN_IF_ERROR(RecoverSnapshots(files, (job / "snapshots").string()));
    const absl::Status removed =
        gradwire::RemoveLeftovers(files, (job / "checkpoints").string());
    if (!removed.ok() && !absl::IsNotFound(removed)) return removed;
    for (const char* folder : {"checkpoints", "snapshots"}) {
      GW_RETURN_IF_ERROR(
          RemoveUnfinishedFetches(files, (job / folder).string()));
    }
  }
  return absl::OkStatus();
}

StateDir::~StateDir() {
  if (!socket_.empty()) unlink(socket_.c_str());
  if (!socket_dir_.empty()) rmdir(socket_dir_.c_str());
  if (lock_fd_ >= 0) close(lock_fd_);
}

absl::StatusOr<std::unique_ptr<PortFile>> PortFile::Write(
    const std::string& path, const std::string& grpc_address,
    const std::string& metrics_address, const std::string& rank_address) {
  std::unique_ptr<PortFile> file(new PortFile);
  file->path_ = path;
  file->content_ =
      "{\"grpc\": \"" + grpc_address + "\", \"metrics\": \"" + metrics_address +
      "\"" +
      (rank_address.empty() ? "" : ", \"rank\": \"" + rank_address + "\"") +
      ", \"pid\": " + std::to_string(getpid()) + "}\n";
  // Always the same, so that one of a server that died here is replaced.
  const std::string pending = path + ".pending";
  const int fd =
      open(pending.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  const auto size = static_cast<ssize_t>(file->content_.size());
  const bool good = fd >= 0 && write(fd, file->content_.data(), size) == size &&
                    fsync(fd) == 0 &&
                    rename(pending.c_str(), path.c_str()) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  if (good) return file;
  unlink(pending.c_str());
  file->path_.clear();
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "PORT_FILE_UNUSABLE")
      .With("errno", error)
      .Message("The port file cannot be written: " +
               std::string(strerror(error)) + ". Give another --port_file.");
}

PortFile::~PortFile() {
  if (path_.empty()) return;
  std::ifstream in(path_);
  std::stringstream content;
  content << in.rdbuf();
  if (content.str() == content_) unlink(path_.c_str());
}

}  // namespace gradwire
