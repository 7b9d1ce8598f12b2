// SPDX-License-Identifier: Apache-2.0
// The files of a training checkpoint as text, and what they must say: for
// checkpoint/training_state.h alone. docs/checkpoints.md is their page.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/sealed_text.h"
#include "checkpoint/training_state.h"

namespace gradwire {

inline constexpr char kStateFormat[] = "gradwire training state";
inline constexpr int kStateVersion = 1;
inline constexpr char kManifestName[] = "manifest.json";
inline constexpr int kMaxRanks = 100'000;
inline constexpr int64_t kMaxStateElements = int64_t{1} << 48;
inline constexpr int64_t kMaxManifestBytes = int64_t{32} << 20;
inline constexpr int64_t kMaxTableBytes = int64_t{32} << 20;
inline constexpr int64_t kMaxHeaderBytes = int64_t{1} << 20;

// "rank-00007.data", "rank-00007.json".
std::string DataName(int rank);
std::string TableName(int rank);

// What one rank has written. Its pieces follow each other in its data file.
struct StateTable {
  int rank = 0;
  int64_t chunk_bytes = 0;
  int64_t data_bytes = 0;
  std::vector<StatePiece> pieces;
  std::vector<std::string> chunk_digests;
};

struct StateManifest {
  struct Rank {
    int64_t table_bytes = 0;
    std::string table_digest;
  };
  StateHeader header;
  std::vector<Rank> ranks;
  std::string digest;  // of the manifest, hence of everything; set by parsing
};

// Texts end with a digest of what stands before it.
std::string TableText(const StateTable& table);
std::string ManifestText(const StateManifest& manifest);
// Errors: DATA_LOSS CHECKPOINT_CORRUPT; of a manifest FAILED_PRECONDITION
// STATE_VERSION. `data_bytes` is the size of the rank's data file.
absl::StatusOr<StateTable> ParseTable(const std::string& text, int rank,
                                      int64_t data_bytes);
absl::StatusOr<StateManifest> ParseManifest(const std::string& text);

// Where the elements are.
struct StateIndex {
  struct Segment {
    int64_t begin = 0;  // elements
    int64_t count = 0;
    int rank = 0;
    int64_t offset = 0;  // bytes, in the rank's data file
  };
  struct Vector {
    DType dtype = DType::kF32;
    std::vector<Segment> segments;  // ascending, without gaps
  };
  std::map<std::string, Vector> vectors;
};

// Errors: INVALID_ARGUMENT STATE_PIECES_INVALID.
absl::Status CheckPiece(const StatePiece& piece);
// Table i is that of rank i. Errors: INVALID_ARGUMENT STATE_PIECES_INVALID.
absl::StatusOr<StateIndex> IndexPieces(int64_t num_parameters,
                                       const std::vector<StateTable>& tables);
// Errors: INVALID_ARGUMENT STATE_HEADER_INVALID.
absl::Status CheckHeader(const StateHeader& header);

// DATA_LOSS CHECKPOINT_CORRUPT, with the chunk.
absl::Status CorruptChunk(const std::string& file, int64_t chunk,
                          const std::string& what);
absl::Status PiecesInvalid(const std::string& field, int64_t value,
                           const std::string& what);

}  // namespace gradwire
