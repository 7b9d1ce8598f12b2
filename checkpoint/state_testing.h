// SPDX-License-Identifier: Apache-2.0
// Small checkpoints for tests: any elements, any pieces, any number of ranks.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/training_state.h"

namespace gradwire {

struct TestState {
  StateHeader header;
  std::map<std::string, DType> dtypes;
  std::map<std::string, std::string> bytes;  // vector -> elements
};

// Random bytes, with optimizer state in `moment_dtype`, or with none.
TestState MakeState(int64_t num_parameters, uint64_t seed,
                    std::optional<DType> moment_dtype);

// Pieces of each rank, which together cover all vectors: cut and dealt by
// `seed`.
std::vector<std::vector<StatePiece>> DealPieces(const TestState& state,
                                                int world, uint64_t seed);

// The bytes of a piece.
std::string_view PieceOf(const TestState& state, const StatePiece& piece);

// Writes the pieces as one rank, in parts of different lengths.
absl::Status WriteRank(FileSystem& files, const std::string& directory,
                       const TestState& state, int rank,
                       const std::vector<StatePiece>& pieces,
                       int64_t chunk_bytes);

// All ranks, one after the other.
absl::StatusOr<StateSummary> Save(
    FileSystem& files, const std::string& directory, const TestState& state,
    const std::vector<std::vector<StatePiece>>& pieces, int64_t chunk_bytes,
    bool replaces = false);

// Opens it and reads all of it. Says what is not as in `state`; "" if nothing.
// A status that is not OK goes to `status`.
std::string Compare(FileSystem& files, const std::string& directory,
                    const TestState& state, absl::Status* status);

std::string ReasonOf(const absl::Status& status);

}  // namespace gradwire
