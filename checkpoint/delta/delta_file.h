// SPDX-License-Identifier: Apache-2.0
// A delta file: the change from one set of weights to the next, as a
// safetensors file of U8 streams. docs/delta.md is its page.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/delta/group.h"
#include "checkpoint/delta/tensor_hash.h"

namespace gradwire {

inline constexpr char kDeltaFormat[] = "dlt1";

struct DeltaInfo {
  std::string model;         // a label
  int64_t step = 0;          // of the new weights
  std::string id;            // WeightId of the new weights
  std::string prev_id;       // of the weights it applies to
  std::string base_id;       // of the full weights that its chain began with
  int64_t chain_length = 1;  // deltas from the base to here, this one included

  bool operator==(const DeltaInfo&) const = default;
};

// What a delta says about one tensor of the new weights.
struct DeltaTensor {
  TensorInfo info;
  Hash128 hash;        // of the new values
  bool fresh = false;  // not there before, or of another dtype or shape
  // Empty if the tensor has not changed.
  std::vector<DeltaGroup> groups;
  std::string_view table;    // as stored
  std::string_view payload;  // of the groups, one after another

  bool changed() const { return !groups.empty(); }
  GroupShape group_shape(int64_t first_chunk, int64_t chunks) const;
};

// A file in memory, checked. Thread rule: const methods from any thread.
class DeltaFile {
 public:
  // Takes the whole file's bytes. Nothing is allocated by a size that the file
  // declares; all stored bytes have been checked against their digests.
  // Errors: INVALID_ARGUMENT SAFETENSORS_INVALID, DELTA_INVALID (field, value,
  // limit): not a delta, or one that contradicts itself. DATA_LOSS
  // DELTA_CORRUPT (field): a digest differs.
  static absl::StatusOr<DeltaFile> Parse(std::string bytes);
  // Reads the file into memory. Also NOT_FOUND MODEL_FILE_NOT_FOUND.
  static absl::StatusOr<DeltaFile> Open(const std::string& path);

  const DeltaInfo& info() const { return info_; }
  // By name, ascending; also those that have not changed.
  const std::vector<DeltaTensor>& tensors() const { return tensors_; }
  int64_t size() const { return static_cast<int64_t>(bytes_->size()); }

  // The rows of a changed tensor's chunks, checked against its groups. Takes
  // memory by the tensor's shape: 20 bytes for 65,536 elements.
  // Errors: INVALID_ARGUMENT DELTA_INVALID.
  static absl::StatusOr<std::vector<ChunkRow>> ReadRows(
      const DeltaTensor& tensor);

 private:
  DeltaFile() = default;

  // On the heap, since tensors_ points into it.
  std::unique_ptr<const std::string> bytes_;
  DeltaInfo info_;
  std::vector<DeltaTensor> tensors_;
};

// Writes `bytes` as a file that appears whole or not at all: a temporary file,
// synced, renamed over `path`, its directory synced.
// Errors: RESOURCE_EXHAUSTED STORAGE_FULL, INTERNAL STORAGE_ERROR.
absl::Status WriteFileWhole(const std::string& path, std::string_view bytes);

// Errors of this directory.
absl::Status DeltaInvalid(const std::string& field, const std::string& value,
                          const std::string& limit, const std::string& what);
absl::Status DeltaCorrupt(const std::string& field, const std::string& what);

}  // namespace gradwire
