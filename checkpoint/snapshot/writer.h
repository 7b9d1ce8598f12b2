// SPDX-License-Identifier: Apache-2.0
// Making a snapshot: what kind it will be, and its files. docs/snapshots.md has
// the order of what is written and why it is synced.
//
// One process plans, writes and publishes a snapshot; only one of a job at a
// time. It reaches files through checkpoint/file_system.h only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/delta/encode.h"
#include "checkpoint/file_system.h"
#include "checkpoint/publish.h"
#include "checkpoint/snapshot/base_writer.h"
#include "checkpoint/snapshot/image.h"
#include "checkpoint/snapshot/manifest.h"

namespace gradwire {

enum class SnapshotKind {
  kBase,
  kDelta,
  kAuto,  // a delta, or a base where there can be none or it would not pay
};

struct SnapshotRequest {
  // .../<name>: the directory that will appear. Its siblings are the job's
  // other snapshots.
  std::string directory;
  std::string job;
  SnapshotKind kind = SnapshotKind::kBase;
  std::string parent;  // of a delta; "": the newest of the job
  std::string operation;
  std::string base_model;
  int64_t weight_version = 0, optimizer_step = 0;
  double ttl_seconds = 0;  // 0: never expires
  // In the order in which their values will be appended; F32 or BF16.
  std::vector<TensorInfo> tensors;
  // Most memory that the parent's weights may take.
  int64_t memory_bytes = INT64_MAX;
  // Of a base: most tensor data of a file, but for a larger tensor's.
  int64_t shard_bytes = kShardBytes;
};

struct SnapshotPlan {
  SnapshotRequest request;
  // The operation was here before, and this is what it has made; there is
  // nothing more to do.
  std::optional<SnapshotManifest> existing;
  // Of a delta: the parent, its full weights, and what they began with.
  std::optional<SnapshotManifest> parent;
  std::unique_ptr<SnapshotImage> image;
  std::string base_id;
  std::string reason;         // why this kind; for people
  int64_t newest_micros = 0;  // when the job's newest snapshot was made
};

// Errors: ALREADY_EXISTS SNAPSHOT_EXISTS; of a delta FAILED_PRECONDITION
// DELTA_PARENT_UNAVAILABLE (parent, cause), DELTA_PARENT_MISMATCH: the parent
// has other tensors; RESOURCE_EXHAUSTED OUT_OF_MEMORY; the file system's. Of
// kAuto none about the parent: it becomes a base.
absl::StatusOr<SnapshotPlan> PlanSnapshot(FileSystem& files,
                                          SnapshotRequest request,
                                          ThreadPool* pool = nullptr);

// Elements that Append takes at once: as many as share a group's streams.
inline constexpr int64_t kSnapshotPieceElements = kGroupChunks * kChunkElements;

// The first error sticks and surfaces in Finish.
class SnapshotWriter {
 public:
  // REQUIRES: plan.existing is empty. Errors: those of PendingDirectory; of a
  // base those of BaseWriter.
  static absl::StatusOr<std::unique_ptr<SnapshotWriter>> Create(
      FileSystem& files, SnapshotPlan plan);
  ~SnapshotWriter();

  bool is_delta() const { return plan_.parent.has_value(); }
  // The next elements of the tensor whose turn it is:
  // min(kSnapshotPieceElements, what is left of it).
  void Append(const void* data, int64_t elements);
  // A file that belongs to a base: config.json, a tokenizer's.
  void AddFile(const std::string& name, const std::string& content);

  // When all tensors have been appended: all that is to appear is on the disk,
  // and hidden. `now_micros`: since 1970; a snapshot is never older than the
  // one before it. Errors: the first that stuck; the file system's.
  absl::Status Finish(int64_t now_micros);
  // REQUIRES: Finish has returned OK. After OK the snapshot outlasts a power
  // loss; after an error it is complete or absent.
  // Errors: FAILED_PRECONDITION DELTA_PARENT_UNAVAILABLE: the parent was
  // deleted meanwhile; ALREADY_EXISTS SNAPSHOT_EXISTS; the file system's.
  absl::StatusOr<SnapshotManifest> Publish();

 private:
  SnapshotWriter(FileSystem& files, SnapshotPlan plan,
                 PendingDirectory pending);
  void AppendDelta(const void* data, int64_t elements);
  absl::Status FinishWeights(SnapshotManifest& manifest);

  FileSystem& files_;
  SnapshotPlan plan_;
  PendingDirectory pending_;
  absl::Status status_;
  std::vector<SnapshotFile> others_;  // beside the weights
  // Of the tensor whose turn it is: its place, and elements that have come.
  size_t tensor_ = 0;
  int64_t done_ = 0;
  // Of a base: its files, the chunks of this tensor and the hashes of the ones
  // before.
  std::unique_ptr<BaseWriter> base_;
  std::vector<Hash128> chunks_, hashes_;
  // Of a delta: where the parent's values are, by this order, and the groups.
  std::vector<const char*> before_;
  std::vector<EncodedTensor> encoded_;
  std::optional<SnapshotManifest> finished_;
};

}  // namespace gradwire
