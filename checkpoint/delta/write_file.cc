// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>

#include "base/error.h"
#include "checkpoint/delta/delta_file.h"

namespace gradwire {
namespace {

absl::Status StorageError(int error, const std::string& what) {
  const bool full = error == ENOSPC || error == EDQUOT;
  return ErrorBuilder(full ? absl::StatusCode::kResourceExhausted
                           : absl::StatusCode::kInternal,
                      full ? "STORAGE_FULL" : "STORAGE_ERROR")
      .Server()
      .With("errno", error)
      .Message("the disk failed to " + what + " (errno " +
               std::to_string(error) +
               "); check the state volume and save again");
}

// 0, or the errno of what failed first.
int WriteAndSync(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t put = write(fd, bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return put < 0 ? errno : EIO;
    bytes.remove_prefix(static_cast<size_t>(put));
  }
  return fsync(fd) == 0 ? 0 : errno;
}

int SyncDirectory(const std::filesystem::path& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return errno;
  const int error = fsync(fd) == 0 ? 0 : errno;
  close(fd);
  return error;
}

}  // namespace

absl::Status WriteFileWhole(const std::string& path, std::string_view bytes) {
  const std::filesystem::path target = std::filesystem::absolute(path);
  std::string pending = target.parent_path() /
                        (".pending." + target.filename().string() + ".XXXXXX");
  const int fd = mkostemp(pending.data(), O_CLOEXEC);
  if (fd < 0) return StorageError(errno, "create a file");
  int error = WriteAndSync(fd, bytes);
  if (fchmod(fd, 0644) != 0 && error == 0) error = errno;
  if (close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && rename(pending.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    unlink(pending.c_str());
    return StorageError(error, "write a file");
  }
  error = SyncDirectory(target.parent_path());
  return error == 0 ? absl::OkStatus() : StorageError(error, "sync");
}

}  // namespace gradwire
