// SPDX-License-Identifier: Apache-2.0
// Small models and their snapshots, for tests.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/writer.h"

namespace gradwire {

// Weights as a model file holds them.
struct TestWeights {
  std::vector<TensorInfo> infos;
  std::vector<std::string> values;  // bytes of each

  // The file model.safetensors.
  std::string File() const;
  // What a base is saved as: that, or shards and their index.
  std::map<std::string, std::string> Files(int64_t shard_bytes) const;
};

// Two tensors of 16-bit floats, or as float32, of `scale` times some elements.
TestWeights MakeWeights(int64_t scale, const std::string& dtype = "BF16");
// Five, of 28, 60, 200, 4 and 12 bytes.
TestWeights MakeLayers();
// After a step: a few elements differ.
TestWeights Step(const TestWeights& weights, uint32_t seed);

struct TestSave {
  SnapshotKind kind = SnapshotKind::kBase;
  std::string parent = {};
  std::string operation = {};
  double ttl_seconds = 0;
  int64_t now_micros = 1'000'000'000'000'000;
  int64_t memory_bytes = INT64_MAX;
  int64_t step = 3;
  int64_t shard_bytes = kShardBytes;
};

// Plans, writes and publishes, as a rank does; of a base also config.json.
absl::StatusOr<SnapshotManifest> SaveTestSnapshot(FileSystem& files,
                                                  const std::string& path,
                                                  const TestWeights& weights,
                                                  const TestSave& save);

// The full weights of a snapshot as one file. Reads, and compares with their
// digests, all files of the chain.
absl::StatusOr<std::string> ReadTestSnapshot(FileSystem& files,
                                             const std::string& directory,
                                             const std::string& name);

std::string ReasonOf(const absl::Status& status);

}  // namespace gradwire
