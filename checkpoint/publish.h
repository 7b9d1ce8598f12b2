// SPDX-License-Identifier: Apache-2.0
// A directory that appears complete or not at all, and small files of models.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"

namespace gradwire {

// Files are written, and synced, into a hidden sibling directory; Publish syncs
// that, renames it to its final name and syncs the parent. Without Publish the
// destructor removes what was written. docs/snapshots.md says what each sync is
// for.
class PendingDirectory {
 public:
  // Removes what an earlier process has left of this and other directories.
  // `parent`: the name of a sibling that must not be removed meanwhile, or ""
  // (see checkpoint/snapshot/remove.h).
  // REQUIRES: one PendingDirectory in a parent directory at a time; neither
  // name has a '~' or begins with a dot.
  // Errors: ALREADY_EXISTS SNAPSHOT_EXISTS; the file system's.
  static absl::StatusOr<PendingDirectory> Create(
      FileSystem& files, const std::string& path,
      const std::string& parent = "");
  PendingDirectory(PendingDirectory&& other) noexcept;
  PendingDirectory& operator=(PendingDirectory&&) = delete;
  ~PendingDirectory();

  // Where to write meanwhile.
  const std::string& path() const { return pending_; }

  // Writes a small file, synced.
  absl::Status Write(const std::string& name, const std::string& content);
  // After OK the directory outlasts a power loss. After an error it is complete
  // or absent; complete only if the last sync failed.
  absl::Status Publish();

 private:
  PendingDirectory(FileSystem& files, std::string path, std::string pending);
  FileSystem* files_;
  std::string final_;
  std::string pending_;  // "" if there is nothing to remove
};

// "name" of ".name.pending" and of ".name~parent.pending", the hidden names of
// a directory that is being written; "" of others. `parent` is set, if given.
std::string PendingName(const std::string& hidden,
                        std::string* parent = nullptr);

// The whole of a file of at most `limit` bytes, of a model that somebody else
// wrote: links are followed.
// Errors: NOT_FOUND MODEL_FILE_NOT_FOUND, INVALID_ARGUMENT (too long).
absl::StatusOr<std::string> ReadSmallFile(const std::string& path,
                                          int64_t limit);

}  // namespace gradwire
