// SPDX-License-Identifier: Apache-2.0
// What a snapshot is, as the file snapshot.json in its directory says it.
// docs/snapshots.md is its page.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "checkpoint/file_system.h"

namespace gradwire {

inline constexpr char kSnapshotManifest[] = "snapshot.json";
inline constexpr char kBaseWeights[] = "model.safetensors";
inline constexpr char kBaseIndex[] = "model.safetensors.index.json";
inline constexpr char kDeltaWeights[] = "delta.safetensors";

// A base may have one file of weights, or from two to so many and an index.
inline constexpr int64_t kMaxShards = 1000;

// model-00002-of-00003.safetensors, of the second of three; model.safetensors
// of one.
std::string BaseWeightsName(int64_t number, int64_t count);
// Whether others take a file of this name for weights or their index.
bool NamesWeights(const std::string& file);

struct SnapshotFile {
  std::string name;  // of one segment
  int64_t bytes = 0;
  std::string digest;  // XXH3-128, hexadecimal

  bool operator==(const SnapshotFile&) const = default;
};

struct SnapshotManifest {
  std::string name, job;
  bool is_delta = false;
  int64_t weight_version = 0, optimizer_step = 0;
  // Of the full weights, which of a delta are those after applying it
  // (checkpoint/delta/tensor_hash.h).
  std::string weight_id;
  // Of a delta: the snapshot of this job that it applies to, and its weight_id;
  // the weight_id that the chain began with; deltas from there to here.
  std::string parent, parent_id;
  std::string base_id;
  int64_t chain_length = 0;
  std::string base_model;  // of the job
  std::string dtype;       // of the weights, as safetensors names it
  // What made it: the same operation, sent again, finds it done. May be empty.
  std::string operation;
  // Microseconds since 1970; never twice the same in a job.
  int64_t created_micros = 0;
  int64_t expires_micros = 0;       // 0: never
  std::vector<SnapshotFile> files;  // all others in the directory
  std::string digest;  // of the manifest, hence of everything; set by parsing

  const char* kind() const { return is_delta ? "delta" : "base"; }
  // Null if there is none of this name.
  const SnapshotFile* Find(const std::string& file) const;
  // Those that hold tensors, in the order of the tensors, and what they add up
  // to. Parsing has checked that they are there, and no others.
  std::vector<SnapshotFile> weights() const;
  int64_t weight_bytes() const;
  // Of one file of weights its digest, of several that of their digests.
  std::string weight_digest() const;
  // Of all files, the manifest without itself.
  int64_t bytes() const;

  bool operator==(const SnapshotManifest&) const = default;
};

std::string SnapshotText(const SnapshotManifest& manifest);
// Errors: DATA_LOSS CHECKPOINT_CORRUPT (file, field); FAILED_PRECONDITION
// STATE_VERSION (have, need).
absl::StatusOr<SnapshotManifest> ParseSnapshot(const std::string& text);

// The manifest of the snapshot `name` in `directory`. Errors: those of
// ParseSnapshot; NOT_FOUND CHECKPOINT_NOT_FOUND; the file system's.
absl::StatusOr<SnapshotManifest> ReadSnapshot(FileSystem& files,
                                              const std::string& directory,
                                              const std::string& name);

// 2026-01-31T23:59:59.000001Z, whose order is that of time.
std::string FormatMicros(int64_t micros);
// 0 if the text is none.
int64_t ParseMicros(const std::string& text);

}  // namespace gradwire
