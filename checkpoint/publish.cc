// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/publish.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

constexpr std::string_view kPendingEnd = ".pending";

std::string NameOf(const std::string& path) {
  return path.substr(path.find_last_of('/') + 1);
}

absl::Status Exists(const std::string& path) {
  const std::string name = NameOf(path);
  return ErrorBuilder(absl::StatusCode::kAlreadyExists, "SNAPSHOT_EXISTS")
      .With("field", "name")
      .With("value", name)
      .Message("there is already a snapshot " + name +
               "; names are used once, choose another");
}

absl::Status CheckAbsent(FileSystem& files, const std::string& path) {
  const auto info = files.Stat(path);
  if (info.ok()) return Exists(path);
  return absl::IsNotFound(info.status()) ? absl::OkStatus() : info.status();
}

}  // namespace

std::string PendingName(const std::string& hidden, std::string* parent) {
  if (!hidden.starts_with('.') || !hidden.ends_with(kPendingEnd) ||
      hidden.size() <= kPendingEnd.size() + 1) {
    return "";
  }
  const std::string inner =
      hidden.substr(1, hidden.size() - 1 - kPendingEnd.size());
  const size_t tilde = inner.find('~');
  if (parent != nullptr) {
    *parent = tilde == std::string::npos ? "" : inner.substr(tilde + 1);
  }
  return inner.substr(0, tilde);
}

PendingDirectory::PendingDirectory(FileSystem& files, std::string path,
                                   std::string pending)
    : files_(&files), final_(std::move(path)), pending_(std::move(pending)) {}

PendingDirectory::PendingDirectory(PendingDirectory&& other) noexcept
    : files_(other.files_),
      final_(std::move(other.final_)),
      pending_(std::move(other.pending_)) {
  other.pending_.clear();
}

PendingDirectory::~PendingDirectory() {
  // What cannot be removed now is a leftover, and removed by the next.
  if (!pending_.empty()) (void)RemoveDirectory(*files_, pending_);
}

absl::StatusOr<PendingDirectory> PendingDirectory::Create(
    FileSystem& files, const std::string& path, const std::string& parent) {
  GW_RETURN_IF_ERROR(CheckAbsent(files, path));
  const std::string above = DirectoryOf(path), name = NameOf(path);
  GW_RETURN_IF_ERROR(MakeDirectories(files, above, 0755));
  // One at a time: whoever wrote these is gone.
  GW_ASSIGN_OR_RETURN(const auto names, files.List(above));
  for (const std::string& other : names) {
    if (PendingName(other).empty()) continue;
    GW_RETURN_IF_ERROR(RemoveIfThere(files, above + "/" + other));
  }
  const std::string pending = above + "/." + name +
                              (parent.empty() ? "" : "~" + parent) +
                              std::string(kPendingEnd);
  GW_RETURN_IF_ERROR(files.MakeDirectory(pending, 0755));
  return PendingDirectory(files, path, pending);
}

absl::Status PendingDirectory::Write(const std::string& name,
                                     const std::string& content) {
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<File> file,
                      files_->Create(pending_ + "/" + name, 0644));
  GW_RETURN_IF_ERROR(file->WriteAt(0, content));
  return file->Sync();
}

absl::Status PendingDirectory::Publish() {
  GW_RETURN_IF_ERROR(files_->SyncDirectory(pending_));
  // Renaming would replace an empty directory; one that has files it refuses.
  GW_RETURN_IF_ERROR(CheckAbsent(*files_, final_));
  if (const absl::Status renamed = files_->Rename(pending_, final_);
      !renamed.ok()) {
    return absl::IsAlreadyExists(renamed) ? Exists(final_) : renamed;
  }
  pending_.clear();
  return files_->SyncDirectory(DirectoryOf(final_));
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
