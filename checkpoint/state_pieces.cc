// SPDX-License-Identifier: Apache-2.0
// What may be saved: headers, pieces, and pieces that make whole vectors.
#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/state_format.h"
#include "checkpoint/strict_json.h"

namespace gradwire {
namespace {

absl::Status HeaderInvalid(const std::string& field, int64_t value,
                           int64_t limit, const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "STATE_HEADER_INVALID")
      .With("field", field)
      .With("value", value)
      .With("limit", limit)
      .Message("a checkpoint cannot be saved: " + field + " " + what);
}

// JSON holds nothing else.
bool IsUtf8(const std::string& text) {
  nlohmann::json json = {{"text", text}}, same;
  ParseStrictJson(
      json.dump(-1, ' ', false, nlohmann::detail::error_handler_t::replace), 1,
      &same);
  return json == same;
}

// That segments follow each other from 0 to the end.
absl::Status CheckCover(const std::string& vector, int64_t num_parameters,
                        std::vector<StateIndex::Segment>& segments) {
  std::sort(segments.begin(), segments.end(),
            [](const auto& a, const auto& b) { return a.begin < b.begin; });
  int64_t end = 0;
  for (const StateIndex::Segment& segment : segments) {
    if (segment.begin < end) {
      return PiecesInvalid(
          vector, segment.begin,
          "has an element that is written twice, here by rank " +
              std::to_string(segment.rank) + "; pieces must not overlap");
    }
    if (segment.begin > end) break;
    end += segment.count;
  }
  if (end == num_parameters) return absl::OkStatus();
  return PiecesInvalid(vector, end,
                       "has an element that no rank has written; pieces must "
                       "cover all of " +
                           std::to_string(num_parameters));
}

}  // namespace

absl::Status PiecesInvalid(const std::string& field, int64_t value,
                           const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "STATE_PIECES_INVALID")
      .With("field", field)
      .With("value", value)
      .Message("pieces of a checkpoint: " + field + " (" +
               std::to_string(value) + ") " + what);
}

absl::Status CheckPiece(const StatePiece& piece) {
  const bool is_weight = piece.vector == "weight";
  if (!is_weight && piece.vector != "m" && piece.vector != "v") {
    return PiecesInvalid(piece.vector.substr(0, 40), piece.begin,
                         "is no vector; there are weight, m and v");
  }
  const bool has_dtype =
      piece.dtype == DType::kF32 || (piece.dtype == DType::kBF16 && !is_weight);
  if (!has_dtype) {
    return PiecesInvalid(piece.vector, piece.begin,
                         std::string("cannot be ") + DTypeName(piece.dtype) +
                             "; weight is f32, m and v are f32 or bf16");
  }
  if (piece.begin < 0 || piece.begin > kMaxStateElements) {
    return PiecesInvalid(piece.vector, piece.begin,
                         "begins outside of 0 to 2^48 elements");
  }
  if (piece.count < 0 || piece.count > kMaxStateElements - piece.begin) {
    return PiecesInvalid(piece.vector, piece.count,
                         "has a count outside of 0 to 2^48 elements");
  }
  return absl::OkStatus();
}

absl::StatusOr<StateIndex> IndexPieces(int64_t num_parameters,
                                       const std::vector<StateTable>& tables) {
  StateIndex index;
  for (const StateTable& table : tables) {
    int64_t offset = 0;
    for (const StatePiece& piece : table.pieces) {
      GW_RETURN_IF_ERROR(CheckPiece(piece));
      if (piece.count > num_parameters - piece.begin) {
        return PiecesInvalid(piece.vector, piece.begin + piece.count,
                             "ends behind the model's last element of " +
                                 std::to_string(num_parameters));
      }
      StateIndex::Vector& vector =
          index.vectors
              .try_emplace(piece.vector, StateIndex::Vector{piece.dtype, {}})
              .first->second;
      if (vector.dtype != piece.dtype) {
        return PiecesInvalid(piece.vector, piece.begin,
                             std::string("is both ") + DTypeName(piece.dtype) +
                                 " and " + DTypeName(vector.dtype) +
                                 "; all ranks must write one dtype");
      }
      vector.segments.push_back({.begin = piece.begin,
                                 .count = piece.count,
                                 .rank = table.rank,
                                 .offset = offset});
      offset += piece.count * DTypeBytes(piece.dtype);
    }
  }
  std::vector<std::string> needed = {"weight"};
  if (index.vectors.contains("m")) needed.push_back("v");
  if (index.vectors.contains("v")) needed.push_back("m");
  for (const std::string& name : needed) {
    StateIndex::Vector& vector = index.vectors[name];
    GW_RETURN_IF_ERROR(CheckCover(name, num_parameters, vector.segments));
  }
  return index;
}

absl::Status CheckHeader(const StateHeader& header) {
  if (header.num_parameters < 1 || header.num_parameters > kMaxStateElements) {
    return HeaderInvalid("num_parameters", header.num_parameters,
                         kMaxStateElements,
                         "is not from 1 to 2^48; give the model's number");
  }
  for (const auto& [name, value] :
       {std::pair("optimizer_step", header.optimizer_step),
        std::pair("weight_version", header.weight_version)}) {
    if (value < 0) {
      return HeaderInvalid(name, value, 0, "is negative; count from 0");
    }
  }
  int64_t bytes = std::ssize(header.model_digest);
  bool is_utf8 = IsUtf8(header.model_digest);
  for (const auto& [name, value] : header.attributes) {
    bytes += std::ssize(name) + std::ssize(value);
    is_utf8 = is_utf8 && IsUtf8(name) && IsUtf8(value);
  }
  if (bytes > kMaxHeaderBytes) {
    return HeaderInvalid("attributes", bytes, kMaxHeaderBytes,
                         "and model_digest are longer than 1 MiB; shorten "
                         "them");
  }
  if (!is_utf8) {
    return HeaderInvalid("attributes", bytes, kMaxHeaderBytes,
                         "or model_digest are not UTF-8; write bytes as "
                         "digits");
  }
  return absl::OkStatus();
}

}  // namespace gradwire
