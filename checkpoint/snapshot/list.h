// SPDX-License-Identifier: Apache-2.0
// The snapshots of a job: which there are, and which go. docs/snapshots.md.
//
// Errors of all functions, beside those named: the file system's.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/manifest.h"

namespace gradwire {

struct ListedSnapshot {
  std::string name;
  // Or CHECKPOINT_CORRUPT, STATE_VERSION.
  absl::StatusOr<SnapshotManifest> manifest;
};

// By name. A directory that does not exist has none.
absl::StatusOr<std::vector<ListedSnapshot>> ListSnapshots(
    FileSystem& files, const std::string& directory);

// The error: FAILED_PRECONDITION SNAPSHOT_HAS_CHILDREN (child).
absl::Status SnapshotHasChildren(const std::string& name,
                                 const std::string& child);

// Takes a snapshot away, be it damaged or not; its name is free when this
// returns. A parent of another one stays, also of one that is being made: a
// save that has begun before keeps its parent, one that begins later does not
// find it.
// REQUIRES: one removal in `directory` at a time, saves beside it.
// Errors: NOT_FOUND CHECKPOINT_NOT_FOUND; FAILED_PRECONDITION
// SNAPSHOT_HAS_CHILDREN (child). After another error it is there, or gone, or
// will be put back or taken away by RecoverSnapshots.
absl::Status RemoveSnapshot(FileSystem& files, const std::string& directory,
                            const std::string& name);

// Removes those that have expired, children before their parents; a parent of
// one that has not stays. Returns the names.
// `expires_micros`: of one, if another time than its manifest's counts; 0:
// never.
// REQUIRES: as RemoveSnapshot.
absl::StatusOr<std::vector<std::string>> RemoveExpired(
    FileSystem& files, const std::string& directory, int64_t now_micros,
    const std::function<int64_t(const SnapshotManifest&)>& expires_micros =
        nullptr);

// For the start of a process, while nobody saves: removes what earlier ones
// have left of saves and removals, puts back what a delta needs, and syncs, so
// that what is there remains. A directory that does not exist needs nothing.
absl::Status RecoverSnapshots(FileSystem& files, const std::string& directory);

}  // namespace gradwire
