// SPDX-License-Identifier: Apache-2.0
// Space on the disk that is kept for what has been done already: on a full disk
// operations that have run are recorded and told, while new ones are refused.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "checkpoint/file_system.h"

namespace gradwire {

// A file that is there for its size alone. Thread rule: any thread.
class SpaceReserve {
 public:
  // `files` outlives it. What an earlier process has left at `path` is taken
  // over.
  SpaceReserve(FileSystem& files, std::string path);

  // Makes it, unless it is there: 1 MiB, or less if little was free at first.
  // Errors: the file system's; then there is none.
  absl::Status Hold();
  // Gives its space to somebody who cannot wait. False: there was none.
  bool Release();

 private:
  absl::Status Make();

  FileSystem& files_;
  const std::string path_;
  int64_t bytes_;
  std::atomic<bool> held_{false};
  std::mutex mutex_;  // held while it is made or removed
};

}  // namespace gradwire
