// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/file_system.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

template <typename Call>
auto Repeat(Call call) {
  auto result = call();
  while (result == -EINTR) result = call();
  return result;
}

struct Failed {
  int error = 0;
  const char* operation = "";
  int64_t needed = 0;
  int64_t free = 0;
};

absl::Status MakeError(const std::string& path, const Failed& failed) {
  const auto with_place = [&](ErrorBuilder error) {
    return error.Server()
        .With("path", path)
        .With("operation", failed.operation)
        .With("errno", failed.error);
  };
  const std::string tried = std::string("the server's disk failed to ") +
                            failed.operation + ": " + strerror(failed.error);
  switch (failed.error) {
    case ENOENT:
    case ENOTDIR:
      return with_place(
                 ErrorBuilder(absl::StatusCode::kNotFound, "FILE_NOT_FOUND"))
          .Message(tried + "; check that the state directory is complete");
    case EEXIST:
    case ENOTEMPTY:
      return with_place(
                 ErrorBuilder(absl::StatusCode::kAlreadyExists, "FILE_EXISTS"))
          .Message(tried + "; choose another name, or remove what is there");
    case ENOSPC:
    case EDQUOT:
      return with_place(ErrorBuilder(absl::StatusCode::kResourceExhausted,
                                     "STORAGE_FULL"))
          .With("needed", failed.needed)
          .With("free", failed.free)
          .Message(tried + "; " + std::to_string(failed.needed) +
                   " bytes are needed and " + std::to_string(failed.free) +
                   " are free: make space on the state volume, then try again");
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case EAGAIN:
      return with_place(ErrorBuilder(absl::StatusCode::kResourceExhausted,
                                     "SYSTEM_LIMIT"))
          .Message(tried +
                   "; raise the server's limits of open files and memory");
    default:
      return with_place(
                 ErrorBuilder(absl::StatusCode::kUnavailable, "STORAGE_IO"))
          .Message(tried + "; check the state volume and the system's log");
  }
}

}  // namespace

absl::Status File::failed_sync() {
  std::lock_guard<std::mutex> lock(mutex_);
  return failed_sync_;
}

absl::Status File::Failure(int error, const char* operation, int64_t needed) {
  return MakeError(path_, {.error = error,
                           .operation = operation,
                           .needed = needed,
                           .free = std::max<int64_t>(CallFreeBytes(), 0)});
}

absl::Status File::WriteAt(int64_t offset, std::string_view bytes) {
  GW_RETURN_IF_ERROR(failed_sync());
  while (!bytes.empty()) {
    const int64_t wrote = Repeat([&] { return CallWrite(offset, bytes); });
    if (wrote <= 0) {
      // A write of nothing would go on for ever.
      const int error = wrote < 0 ? static_cast<int>(-wrote) : EIO;
      return Failure(error, "write", static_cast<int64_t>(bytes.size()));
    }
    offset += wrote;
    bytes.remove_prefix(static_cast<size_t>(wrote));
  }
  return absl::OkStatus();
}

absl::Status File::Append(std::string_view bytes) {
  GW_ASSIGN_OR_RETURN(const int64_t end, Size());
  return WriteAt(end, bytes);
}

absl::StatusOr<int64_t> File::ReadAt(int64_t offset, int64_t bytes, char* out) {
  int64_t done = 0;
  while (done < bytes) {
    const int64_t got = Repeat(
        [&] { return CallRead(offset + done, bytes - done, out + done); });
    if (got < 0) return Failure(static_cast<int>(-got), "read", 0);
    if (got == 0) break;
    done += got;
  }
  return done;
}

absl::Status File::SyncOnce(bool all) {
  // One at a time: the system reports a failure to one caller only, and another
  // that syncs the same bytes beside it would be told that all is well.
  std::lock_guard<std::mutex> one_at_a_time(sync_mutex_);
  GW_RETURN_IF_ERROR(failed_sync());
  const int result = Repeat([&] { return CallSync(all); });
  if (result >= 0) return absl::OkStatus();
  const absl::Status status = Failure(-result, "sync", 0);
  std::lock_guard<std::mutex> lock(mutex_);
  failed_sync_ = status;
  return status;
}

absl::Status File::Sync() { return SyncOnce(false); }

absl::Status File::SyncAll() { return SyncOnce(true); }

void File::StartWriteBack(int64_t offset, int64_t bytes) {
  CallStartWriteBack(offset, bytes);
}

absl::Status File::Truncate(int64_t bytes) {
  GW_RETURN_IF_ERROR(failed_sync());
  const int result = Repeat([&] { return CallTruncate(bytes); });
  return result < 0 ? Failure(-result, "truncate", 0) : absl::OkStatus();
}

absl::StatusOr<int64_t> File::Size() {
  const int64_t size = Repeat([&] { return CallSize(); });
  if (size < 0) return Failure(static_cast<int>(-size), "measure", 0);
  return size;
}

absl::Status FileSystem::Outcome(int64_t result, const std::string& path,
                                 const char* operation) {
  if (result >= 0) return absl::OkStatus();
  const int64_t free = CallFreeBytes(DirectoryOf(path));
  return MakeError(path, {.error = static_cast<int>(-result),
                          .operation = operation,
                          .needed = 1,
                          .free = std::max<int64_t>(free, 0)});
}

absl::StatusOr<std::unique_ptr<File>> FileSystem::Create(
    const std::string& path, int mode) {
  GW_RETURN_IF_ERROR(MayChange());
  std::unique_ptr<File> file;
  GW_RETURN_IF_ERROR(
      Outcome(Repeat([&] { return CallCreate(path, mode, &file); }), path,
              "create a file"));
  return file;
}

absl::StatusOr<std::unique_ptr<File>> FileSystem::Open(const std::string& path,
                                                       Access access) {
  std::unique_ptr<File> file;
  GW_RETURN_IF_ERROR(
      Outcome(Repeat([&] { return CallOpen(path, access, &file); }), path,
              "open a file"));
  return file;
}

absl::Status FileSystem::MakeDirectory(const std::string& path, int mode) {
  GW_RETURN_IF_ERROR(MayChange());
  return Outcome(Repeat([&] { return CallMakeDirectory(path, mode); }), path,
                 "make a directory");
}

absl::Status FileSystem::Rename(const std::string& from,
                                const std::string& to) {
  GW_RETURN_IF_ERROR(MayChange());
  return Outcome(Repeat([&] { return CallRename(from, to); }), to, "rename");
}

absl::StatusOr<bool> FileSystem::Exchange(const std::string& one,
                                          const std::string& other) {
  GW_RETURN_IF_ERROR(MayChange());
  const int result = Repeat([&] { return CallExchange(one, other); });
  if (result == -EINVAL || result == -ENOSYS || result == -EOPNOTSUPP) {
    return false;
  }
  GW_RETURN_IF_ERROR(Outcome(result, other, "exchange"));
  return true;
}

absl::StatusOr<bool> FileSystem::Link(const std::string& file,
                                      const std::string& name) {
  GW_RETURN_IF_ERROR(MayChange());
  const int result = Repeat([&] { return CallLink(file, name); });
  if (result == -EPERM || result == -EXDEV || result == -EMLINK ||
      result == -ENOSYS || result == -EOPNOTSUPP) {
    return false;
  }
  GW_RETURN_IF_ERROR(Outcome(result, name, "link"));
  return true;
}

absl::Status FileSystem::Remove(const std::string& path) {
  GW_RETURN_IF_ERROR(MayChange());
  return Outcome(Repeat([&] { return CallRemove(path); }), path, "remove");
}

absl::StatusOr<std::vector<std::string>> FileSystem::List(
    const std::string& directory) {
  std::vector<std::string> names;
  GW_RETURN_IF_ERROR(
      Outcome(Repeat([&] { return CallList(directory, &names); }), directory,
              "list a directory"));
  std::sort(names.begin(), names.end());
  return names;
}

absl::Status FileSystem::SyncDirectory(const std::string& path) {
  return Outcome(Repeat([&] { return CallSyncDirectory(path); }), path,
                 "sync a directory");
}

absl::StatusOr<FileSystem::Info> FileSystem::Stat(const std::string& path) {
  Info info;
  GW_RETURN_IF_ERROR(
      Outcome(Repeat([&] { return CallStat(path, &info); }), path, "look up"));
  return info;
}

absl::StatusOr<int64_t> FileSystem::FreeBytes(const std::string& path) {
  const int64_t free = Repeat([&] { return CallFreeBytes(path); });
  GW_RETURN_IF_ERROR(Outcome(free, path, "measure free space"));
  return free;
}

absl::Status MakeDirectories(FileSystem& files, const std::string& path,
                             int mode) {
  const auto found = files.Stat(path);
  if (found.ok() && found->is_directory) return absl::OkStatus();
  const std::string above = DirectoryOf(path);
  if (above != path) {
    GW_RETURN_IF_ERROR(MakeDirectories(files, above, mode));
  }
  const absl::Status made = files.MakeDirectory(path, mode);
  // Somebody else was faster, or it is no directory.
  if (absl::IsAlreadyExists(made)) {
    GW_ASSIGN_OR_RETURN(const FileSystem::Info info, files.Stat(path));
    if (!info.is_directory) return made;
  } else {
    GW_RETURN_IF_ERROR(made);
  }
  return files.SyncDirectory(above);
}

absl::Status RemoveDirectory(FileSystem& files, const std::string& path) {
  GW_ASSIGN_OR_RETURN(const auto names, files.List(path));
  for (const std::string& name : names) {
    GW_RETURN_IF_ERROR(files.Remove(path + "/" + name));
  }
  return files.Remove(path);
}

absl::Status RemoveIfThere(FileSystem& files, const std::string& path) {
  const auto info = files.Stat(path);
  if (absl::IsNotFound(info.status())) return absl::OkStatus();
  GW_RETURN_IF_ERROR(info.status());
  return info->is_directory ? RemoveDirectory(files, path) : files.Remove(path);
}

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace gradwire
