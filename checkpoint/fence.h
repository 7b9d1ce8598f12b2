// SPDX-License-Identifier: Apache-2.0
// Keeps a process that has lost its lease from changing what is on the disk.
// Every server that takes a state directory over has a higher epoch than all
// before it, and says so in a directory, by a file whose name is that number;
// who has a lower one changes no name any more. docs/recovery.md.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"

namespace gradwire {

// From when it returns on, lower epochs are fenced; that outlasts a power loss.
// Makes `directory` if it is not there. Two may do so at once: the higher one
// wins.
// Errors: FAILED_PRECONDITION EPOCH_FENCED: `epoch` is not the highest; the
// file system's.
absl::Status RaiseEpoch(FileSystem& files, const std::string& directory,
                        int64_t epoch);

// The highest that was raised; 0: none was.
absl::StatusOr<int64_t> HighestEpoch(FileSystem& files,
                                     const std::string& directory);

// FAILED_PRECONDITION EPOCH_FENCED (epoch, highest): who has `epoch` has lost
// the lease to `highest`.
absl::Status EpochFenced(int64_t epoch, int64_t highest);

// EpochFenced, if there is a higher one
// than `epoch`. A directory that is not there fences nobody.
absl::Status CheckEpoch(FileSystem& files, const std::string& directory,
                        int64_t epoch);

// `base`, as a process of this epoch may use it: all that makes, renames,
// exchanges, links or removes a name asks CheckEpoch first, and fails with its
// error. Files that are open stay so: whoever keeps one open under its final
// name has to say what of it counts (docs/oplog.md). `base` outlives what is
// returned.
std::unique_ptr<FileSystem> FencedFileSystem(FileSystem& base,
                                             const std::string& directory,
                                             int64_t epoch);

}  // namespace gradwire
