// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/state_testing.h"

#include <algorithm>
#include <random>
#include <utility>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {

TestState MakeState(int64_t num_parameters, uint64_t seed,
                    std::optional<DType> moment_dtype) {
  TestState state;
  state.header = {.num_parameters = num_parameters,
                  .model_digest = "digest of " + std::to_string(seed),
                  .optimizer_step = 17,
                  .weight_version = 18,
                  .attributes = {{"base_model", "a/b"}, {"note", "ä \"\n"}}};
  state.dtypes["weight"] = DType::kF32;
  if (moment_dtype.has_value()) {
    state.dtypes["m"] = state.dtypes["v"] = *moment_dtype;
  }
  std::mt19937_64 random(seed);
  for (const auto& [vector, dtype] : state.dtypes) {
    std::string& bytes = state.bytes[vector];
    for (int64_t i = 0; i < num_parameters * DTypeBytes(dtype); ++i) {
      bytes.push_back(static_cast<char>(random()));
    }
  }
  return state;
}

std::vector<std::vector<StatePiece>> DealPieces(const TestState& state,
                                                int world, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<StatePiece>> pieces(static_cast<size_t>(world));
  const int64_t longest = state.header.num_parameters * 2 / (world + 1) + 1;
  for (const auto& [vector, dtype] : state.dtypes) {
    for (int64_t begin = 0; begin < state.header.num_parameters;) {
      const int64_t drawn =
          1 + static_cast<int64_t>(random() % static_cast<uint64_t>(longest));
      const int64_t count =
          std::min(drawn, state.header.num_parameters - begin);
      pieces[random() % pieces.size()].push_back({vector, dtype, begin, count});
      begin += count;
    }
  }
  for (auto& each : pieces) std::shuffle(each.begin(), each.end(), random);
  return pieces;
}

std::string_view PieceOf(const TestState& state, const StatePiece& piece) {
  const int64_t element = DTypeBytes(piece.dtype);
  return std::string_view(state.bytes.at(piece.vector))
      .substr(static_cast<size_t>(piece.begin * element),
              static_cast<size_t>(piece.count * element));
}

absl::Status WriteRank(FileSystem& files, const std::string& directory,
                       const TestState& state, int rank,
                       const std::vector<StatePiece>& pieces,
                       int64_t chunk_bytes) {
  GW_ASSIGN_OR_RETURN(
      auto writer, StateWriter::Create(files, directory, rank, {chunk_bytes}));
  int64_t bytes = 0;
  for (const StatePiece& piece : pieces) {
    GW_RETURN_IF_ERROR(writer->Begin(piece));
    const std::string_view all = PieceOf(state, piece);
    const size_t first = all.size() * 2 / 3;
    GW_RETURN_IF_ERROR(writer->Write(all.data(), static_cast<int64_t>(first)));
    GW_RETURN_IF_ERROR(writer->Write(all.data() + first,
                                     static_cast<int64_t>(all.size() - first)));
    bytes += std::ssize(all);
  }
  if (writer->bytes_written() != bytes) {
    return absl::InternalError("bytes_written is wrong");
  }
  return writer->Finish();
}

absl::StatusOr<StateSummary> Save(
    FileSystem& files, const std::string& directory, const TestState& state,
    const std::vector<std::vector<StatePiece>>& pieces, int64_t chunk_bytes,
    bool replaces) {
  GW_ASSIGN_OR_RETURN(PendingState pending,
                      PendingState::Create(files, directory, replaces));
  for (size_t rank = 0; rank < pieces.size(); ++rank) {
    GW_RETURN_IF_ERROR(WriteRank(files, PendingPath(directory), state,
                                 static_cast<int>(rank), pieces[rank],
                                 chunk_bytes));
  }
  return pending.Publish(state.header, static_cast<int>(pieces.size()));
}

std::string Compare(FileSystem& files, const std::string& directory,
                    const TestState& state, absl::Status* status) {
  auto reader = StateReader::Open(files, directory);
  *status = reader.status();
  if (!reader.ok()) return "cannot be opened: " + status->ToString();
  const StateHeader& header = (*reader)->header();
  if (header.num_parameters != state.header.num_parameters ||
      header.model_digest != state.header.model_digest ||
      header.optimizer_step != state.header.optimizer_step ||
      header.weight_version != state.header.weight_version ||
      header.attributes != state.header.attributes) {
    return "has another header";
  }
  for (const std::string vector : {"weight", "m", "v"}) {
    const auto dtype = state.dtypes.find(vector);
    const auto has = (*reader)->dtype(vector);
    if (has.has_value() != (dtype != state.dtypes.end())) {
      return "has or lacks " + vector;
    }
    if (!has.has_value()) continue;
    if (*has != dtype->second) return "has another dtype of " + vector;
    std::string read(state.bytes.at(vector).size(), '\0');
    *status = (*reader)->Read(vector, 0, header.num_parameters, read.data());
    if (!status->ok()) return "cannot be read: " + status->ToString();
    if (read != state.bytes.at(vector)) return "has other bytes of " + vector;
  }
  return "";
}

std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : "";
}

}  // namespace gradwire
