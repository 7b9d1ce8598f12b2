// SPDX-License-Identifier: Apache-2.0
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <utility>

#include "checkpoint/file_system.h"

namespace gradwire {
namespace {

// A system call's result, or -errno.
template <typename Result>
Result OrErrno(Result result) {
  return result < 0 ? static_cast<Result>(-errno) : result;
}

int64_t FreeOf(int result, const struct statvfs& info) {
  if (result < 0) return -errno;
  return static_cast<int64_t>(info.f_bavail) *
         static_cast<int64_t>(info.f_frsize);
}

class PosixFile : public File {
 public:
  PosixFile(std::string path, int fd) : File(std::move(path)), fd_(fd) {}
  ~PosixFile() override { close(fd_); }

 protected:
  int64_t CallWrite(int64_t offset, std::string_view bytes) override {
    return OrErrno<int64_t>(pwrite(fd_, bytes.data(), bytes.size(), offset));
  }
  int64_t CallRead(int64_t offset, int64_t bytes, char* out) override {
    return OrErrno<int64_t>(
        pread(fd_, out, static_cast<size_t>(bytes), offset));
  }
  int CallSync(bool all) override {
    return OrErrno(all ? fsync(fd_) : fdatasync(fd_));
  }
  void CallStartWriteBack(int64_t offset, int64_t bytes) override {
    (void)sync_file_range(fd_, offset, bytes, SYNC_FILE_RANGE_WRITE);
  }
  int CallTruncate(int64_t bytes) override {
    return OrErrno(ftruncate(fd_, bytes));
  }
  int64_t CallSize() override {
    struct stat info;
    const int result = fstat(fd_, &info);
    return result < 0 ? -errno : static_cast<int64_t>(info.st_size);
  }
  int64_t CallFreeBytes() override {
    struct statvfs info;
    const int result = fstatvfs(fd_, &info);
    return FreeOf(result, info);
  }

 private:
  const int fd_;
};

class Posix : public FileSystem {
 protected:
  int CallOpen(const std::string& path, Access access,
               std::unique_ptr<File>* file) override {
    return OpenAs(path, access == Access::kRead ? O_RDONLY : O_RDWR, 0, file);
  }
  int CallCreate(const std::string& path, int mode,
                 std::unique_ptr<File>* file) override {
    return OpenAs(path, O_RDWR | O_CREAT | O_EXCL, mode, file);
  }
  int CallMakeDirectory(const std::string& path, int mode) override {
    return OrErrno(mkdir(path.c_str(), static_cast<mode_t>(mode)));
  }
  int CallRename(const std::string& from, const std::string& to) override {
    return OrErrno(rename(from.c_str(), to.c_str()));
  }
  int CallExchange(const std::string& one, const std::string& other) override {
    return OrErrno(renameat2(AT_FDCWD, one.c_str(), AT_FDCWD, other.c_str(),
                             RENAME_EXCHANGE));
  }
  int CallLink(const std::string& file, const std::string& name) override {
    return OrErrno(link(file.c_str(), name.c_str()));
  }
  int CallRemove(const std::string& path) override {
    return OrErrno(remove(path.c_str()));
  }
  int CallList(const std::string& directory,
               std::vector<std::string>* names) override {
    names->clear();
    DIR* open = opendir(directory.c_str());
    if (open == nullptr) return -errno;
    int error = 0;
    for (;;) {
      errno = 0;
      const dirent* entry = readdir(open);
      if (entry == nullptr) {
        error = errno;
        break;
      }
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names->push_back(name);
    }
    closedir(open);
    return -error;
  }
  int CallSyncDirectory(const std::string& path) override {
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return -errno;
    const int result = OrErrno(fsync(fd));
    close(fd);
    return result;
  }
  int CallStat(const std::string& path, Info* info) override {
    struct stat found;
    if (lstat(path.c_str(), &found) < 0) return -errno;
    info->is_directory = S_ISDIR(found.st_mode);
    info->bytes = found.st_size;
    return 0;
  }
  int64_t CallFreeBytes(const std::string& path) override {
    struct statvfs info;
    const int result = statvfs(path.c_str(), &info);
    return FreeOf(result, info);
  }

 private:
  static int OpenAs(const std::string& path, int flags, int mode,
                    std::unique_ptr<File>* file) {
    const int fd = open(path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, mode);
    if (fd < 0) return -errno;
    *file = std::make_unique<PosixFile>(path, fd);
    return 0;
  }
};

}  // namespace

FileSystem& PosixFileSystem() {
  static Posix file_system;
  return file_system;
}

}  // namespace gradwire
