// SPDX-License-Identifier: Apache-2.0
// A snapshot becomes a model: a Hugging Face directory that no longer depends
// on the job or on other snapshots. docs/snapshots.md.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/base_writer.h"
#include "checkpoint/snapshot/manifest.h"
#include "device/thread_pool.h"

namespace gradwire {

struct PromoteRequest {
  std::string directory, name;  // of the snapshot
  // Its path, as users know it: kept in the model's manifest, as `operation`,
  // so that the same request, sent again, finds it done.
  std::string source;
  std::string models_directory, model_id;  // of one segment
  int64_t now_micros = 0;
  int64_t memory_bytes = INT64_MAX;   // most that the weights may take
  int64_t shard_bytes = kShardBytes;  // as in SnapshotRequest
  ThreadPool* pool = nullptr;
};

// Returns the model's manifest; that of a base. The directory appears complete
// or not at all. If it is there already, made of this source and these weights,
// nothing is done, even if the snapshot is gone.
// REQUIRES: one promotion to a models_directory at a time, and none of the
// chain removed meanwhile.
// Errors: ALREADY_EXISTS MODEL_EXISTS; those of ReadChain, SnapshotImage and
// BaseWriter; the file system's.
absl::StatusOr<SnapshotManifest> PromoteSnapshot(FileSystem& files,
                                                 const PromoteRequest& request);

}  // namespace gradwire
