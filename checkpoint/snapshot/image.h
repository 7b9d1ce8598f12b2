// SPDX-License-Identifier: Apache-2.0
// The full weights of a snapshot in memory: a base as it is stored, with the
// deltas from there on applied. docs/snapshots.md.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "checkpoint/delta/apply.h"
#include "checkpoint/delta/encode.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/manifest.h"

namespace gradwire {

// The snapshots from a base to `name`, which is last; of a base, itself alone.
// Each delta's parent_id is the weight_id of the one before it.
// Errors: those of ReadSnapshot for `name` itself; FAILED_PRECONDITION
// DELTA_PARENT_UNAVAILABLE (parent, cause): one before it is gone or damaged;
// FAILED_PRECONDITION DELTA_PARENT_MISMATCH: one is not what its child was made
// from. The file system's.
absl::StatusOr<std::vector<SnapshotManifest>> ReadChain(
    FileSystem& files, const std::string& directory, const std::string& name);

// A whole file of a snapshot in memory, which has the size and the digest that
// the manifest says. Errors: DATA_LOSS CHECKPOINT_CORRUPT; the file system's.
absl::StatusOr<std::string> ReadSnapshotFile(FileSystem& files,
                                             const std::string& path,
                                             const SnapshotFile& file);

class SnapshotImage {
 public:
  // Reads and applies a chain of ReadChain, and compares the weight id of what
  // comes out with that of the last, and the base's index with what its shards
  // hold. A file of weights that no manifest names is damage, for others would
  // read it. Takes memory of the base's size, which has to be at most
  // `limit_bytes`, beside the largest delta.
  // Errors: DATA_LOSS CHECKPOINT_CORRUPT (snapshot, file); RESOURCE_EXHAUSTED
  // OUT_OF_MEMORY; the file system's.
  static absl::StatusOr<std::unique_ptr<SnapshotImage>> Read(
      FileSystem& files, const std::string& directory,
      const std::vector<SnapshotManifest>& chain, int64_t limit_bytes,
      ThreadPool* pool = nullptr);

  // In the order in which the base was saved, whatever its files.
  std::vector<TensorView> tensors() const;
  // Of the base's files of weights.
  int64_t bytes() const;
  const std::string& weight_id() const { return weight_id_; }

 private:
  SnapshotImage() = default;
  // `reading`: the file that an error is about.
  absl::Status Load(FileSystem& files, const std::string& path,
                    const SnapshotManifest& manifest, std::string& reading);
  absl::Status Apply(std::string delta, const SnapshotManifest& manifest,
                     ThreadPool* pool);

  std::deque<std::string> files_;  // whole, which stay where they are
  std::vector<MutableTensor> tensors_;
  std::string weight_id_;
};

}  // namespace gradwire
