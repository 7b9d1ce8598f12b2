// SPDX-License-Identifier: Apache-2.0
// The weights of a base as files: one, or shards with an index, as transformers
// writes and reads them. docs/snapshots.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "checkpoint/delta/encode.h"
#include "checkpoint/file_system.h"
#include "checkpoint/publish.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/snapshot/manifest.h"

namespace gradwire {

// Where each file ends, in tensors: as many as fit in `shard_bytes` of tensor
// data, and one that is larger alone.
// Errors: INVALID_ARGUMENT OPTION_OUT_OF_RANGE: more than kMaxShards.
absl::StatusOr<std::vector<size_t>> SplitShards(
    absl::Span<const TensorInfo> tensors, int64_t shard_bytes);

// The text of model.safetensors.index.json. REQUIRES: `ends` of SplitShards.
std::string IndexText(absl::Span<const TensorInfo> tensors,
                      const std::vector<size_t>& ends);

// The first error sticks and surfaces in Finish.
class BaseWriter {
 public:
  // `files` and `pending`, where it writes, outlive it.
  // Errors: those of SplitShards.
  static absl::StatusOr<std::unique_ptr<BaseWriter>> Create(
      FileSystem& files, PendingDirectory& pending,
      std::vector<TensorInfo> tensors, int64_t shard_bytes);

  // The next bytes, of one tensor.
  void Append(const void* data, int64_t bytes);
  // When all tensors have been appended; syncs every file.
  absl::Status Finish();
  // After Finish: weights in the order of the tensors, then the index.
  const std::vector<SnapshotFile>& files() const { return made_; }

 private:
  BaseWriter(FileSystem& files, PendingDirectory& pending,
             std::vector<TensorInfo> tensors, std::vector<size_t> ends);
  void BeginShard();
  absl::Status EndShard();

  FileSystem& files_;
  PendingDirectory& pending_;
  const std::vector<TensorInfo> tensors_;
  const std::vector<size_t> ends_;
  std::vector<SnapshotFile> made_;
  absl::Status status_;
  // Of the file that is being written, which is number made_.size().
  std::unique_ptr<SafetensorsWriter> shard_;
  int64_t bytes_left_ = 0;
};

}  // namespace gradwire
