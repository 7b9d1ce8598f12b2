// SPDX-License-Identifier: Apache-2.0
// Making a delta: at once from two sets of weights, or from shards that ranks
// have encoded alone.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "checkpoint/delta/delta_file.h"
#include "checkpoint/delta/group.h"
#include "device/thread_pool.h"

namespace gradwire {

// A tensor's values, aligned to its elements. Null only if there are none.
struct TensorView {
  TensorInfo info;
  const void* data = nullptr;
};

struct DeltaOptions {
  std::string model;
  int64_t step = 0;
  // WeightId of the old weights, and of the full ones the chain began with.
  std::string prev_id;
  std::string base_id;
  int64_t chain_length = 1;
  // Streams are stored as they are: a larger file, sooner.
  bool fast = false;
  // Where shards of a tensor begin, in elements: ascending multiples of
  // kChunkElements, without the 0. Groups do not cross them.
  std::map<std::string, std::vector<int64_t>> shard_begins;
  // Null: the calling thread alone.
  ThreadPool* pool = nullptr;
};

// The file that makes `after` of `before`. A tensor that `before` lacks, or has
// with another dtype or shape, is stored whole; one that `after` lacks is gone.
// Errors: INVALID_ARGUMENT DELTA_INVALID: an unknown dtype, a name that comes
// twice, is not ASCII or too long, an id or a shard_begins that is none.
absl::StatusOr<std::string> EncodeDelta(absl::Span<const TensorView> before,
                                        absl::Span<const TensorView> after,
                                        const DeltaOptions& options);

// WeightId of `weights`. Reads them all.
std::string ComputeWeightId(absl::Span<const TensorView> weights,
                            ThreadPool* pool = nullptr);

// The same in two halves, for ranks that hold a part each.

// The elements of one shard; `before` null if the tensor is fresh.
// REQUIRES: the dtype is known; the shard begins at a multiple of
// kChunkElements of its tensor, and ends at one or at the tensor's end.
std::vector<EncodedGroup> EncodeShard(const std::string& dtype,
                                      const void* before, const void* after,
                                      int64_t num_elements, bool fast);

struct EncodedTensor {
  TensorInfo info;
  bool fresh = false;
  // Of all shards, in the order of their elements; with hashes and rows also
  // where nothing changed.
  std::vector<EncodedGroup> groups;
  // In place of what the groups' hashes give. With it, a tensor that has not
  // changed needs no groups.
  std::optional<Hash128> hash;
};
// `options` without shard_begins, fast and pool. Errors: as EncodeDelta.
absl::StatusOr<std::string> AssembleDelta(std::vector<EncodedTensor> tensors,
                                          const DeltaOptions& options);

}  // namespace gradwire
