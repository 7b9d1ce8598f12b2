// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/publish.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

absl::Status StorageError(int error, const std::string& what) {
  const bool full = error == ENOSPC || error == EDQUOT;
  return ErrorBuilder(full ? absl::StatusCode::kResourceExhausted
                           : absl::StatusCode::kInternal,
                      full ? "STORAGE_FULL" : "STORAGE_ERROR")
      .Server()
      .With("errno", error)
      .Message("the server's disk failed to " + what + " (errno " +
               std::to_string(error) +
               "); check the state volume and save again");
}

absl::Status Exists(const std::string& path) {
  const std::string name = std::filesystem::path(path).filename();
  return ErrorBuilder(absl::StatusCode::kAlreadyExists, "SNAPSHOT_EXISTS")
      .With("value", name)
      .Message("there is already a snapshot " + name +
               "; names are used once, choose another");
}

absl::Status SyncPath(const std::string& path, int flags) {
  const int fd = open(path.c_str(), flags | O_CLOEXEC);
  if (fd < 0) return StorageError(errno, "open a directory");
  const int error = fsync(fd) == 0 ? 0 : errno;
  close(fd);
  return error == 0 ? absl::OkStatus() : StorageError(error, "sync");
}

}  // namespace

PendingDirectory::PendingDirectory(std::string path, std::string pending)
    : final_(std::move(path)), pending_(std::move(pending)) {}

PendingDirectory::PendingDirectory(PendingDirectory&& other) noexcept
    : final_(std::move(other.final_)), pending_(std::move(other.pending_)) {
  other.pending_.clear();
}

PendingDirectory::~PendingDirectory() {
  std::error_code ignored;
  if (!pending_.empty()) std::filesystem::remove_all(pending_, ignored);
}

absl::StatusOr<PendingDirectory> PendingDirectory::Create(
    const std::string& path) {
  const std::filesystem::path target(path);
  std::error_code error;
  if (std::filesystem::exists(target, error)) return Exists(path);
  std::filesystem::create_directories(target.parent_path(), error);
  if (error) return StorageError(error.value(), "create a directory");
  std::string pending = target.parent_path() /
                        (".pending." + target.filename().string() + ".XXXXXX");
  if (mkdtemp(pending.data()) == nullptr) {
    return StorageError(errno, "create a directory");
  }
  chmod(pending.c_str(), 0755);
  return PendingDirectory(path, pending);
}

absl::Status PendingDirectory::Write(const std::string& name,
                                     const std::string& content) {
  const std::string path = pending_ + "/" + name;
  const int fd =
      open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return StorageError(errno, "create a file");
  size_t done = 0;
  int error = 0;
  while (done < content.size()) {
    const ssize_t put = write(fd, content.data() + done, content.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      error = put < 0 ? errno : EIO;
      break;
    }
    done += static_cast<size_t>(put);
  }
  if (error == 0 && fsync(fd) != 0) error = errno;
  if (close(fd) != 0 && error == 0) error = errno;
  return error == 0 ? absl::OkStatus() : StorageError(error, "write a file");
}

absl::Status PendingDirectory::Publish() {
  GW_RETURN_IF_ERROR(SyncPath(pending_, O_RDONLY | O_DIRECTORY));
  // RENAME_NOREPLACE: of two saves of one name the second is refused.
  if (renameat2(AT_FDCWD, pending_.c_str(), AT_FDCWD, final_.c_str(),
                RENAME_NOREPLACE) != 0) {
    if (errno == EEXIST || errno == ENOTEMPTY) return Exists(final_);
    return StorageError(errno, "publish a directory");
  }
  pending_.clear();
  return SyncPath(std::filesystem::path(final_).parent_path(),
                  O_RDONLY | O_DIRECTORY);
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path,
                                          int64_t limit) {
  const std::string name = std::filesystem::path(path).filename();
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    if (fd >= 0) close(fd);
    return ErrorBuilder(absl::StatusCode::kNotFound, "MODEL_FILE_NOT_FOUND")
        .With("field", name)
        .Message(name +
                 " cannot be read; base_model must be a Hugging Face "
                 "directory on the server's machine");
  }
  if (info.st_size > limit) {
    close(fd);
    return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                        "MODEL_CONFIG_INVALID")
        .With("field", name)
        .With("value", int64_t{info.st_size})
        .With("limit", limit)
        .Message(name + " is longer than " + std::to_string(limit) +
                 " bytes; give an unmodified file of the model");
  }
  std::string content(static_cast<size_t>(info.st_size), '\0');
  size_t done = 0;
  while (done < content.size()) {
    const ssize_t got = read(fd, content.data() + done, content.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    done += static_cast<size_t>(got);
  }
  close(fd);
  content.resize(done);
  return content;
}

}  // namespace gradwire
