// SPDX-License-Identifier: Apache-2.0
// A directory that appears complete or not at all.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace gradwire {

// Files are written into a hidden sibling directory; Publish syncs it, renames
// it to its final name and syncs the parent. Without Publish the destructor
// removes what was written.
class PendingDirectory {
 public:
  // Errors: ALREADY_EXISTS SNAPSHOT_EXISTS; STORAGE_FULL, STORAGE_ERROR.
  static absl::StatusOr<PendingDirectory> Create(const std::string& path);
  PendingDirectory(PendingDirectory&& other) noexcept;
  PendingDirectory& operator=(PendingDirectory&&) = delete;
  ~PendingDirectory();

  // Where to write meanwhile.
  const std::string& path() const { return pending_; }

  // Writes a small file, synced.
  absl::Status Write(const std::string& name, const std::string& content);
  absl::Status Publish();

 private:
  PendingDirectory(std::string path, std::string pending);
  std::string final_;
  std::string pending_;
};

// The whole of a file of at most `limit` bytes.
// Errors: NOT_FOUND MODEL_FILE_NOT_FOUND, INVALID_ARGUMENT (too long).
absl::StatusOr<std::string> ReadSmallFile(const std::string& path,
                                          int64_t limit);

}  // namespace gradwire
