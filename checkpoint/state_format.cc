// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/state_format.h"

#include <cstdio>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/strict_json.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

// Manifest, array, object, and one to spare for later versions.
constexpr int kMaxDepth = 4;

std::string RankName(int rank, const char* ending) {
  char name[32];
  std::snprintf(name, sizeof(name), "rank-%05d.%s", rank, ending);
  return name;
}

absl::Status Wrong(const std::string& file, const JsonFields& fields) {
  return CorruptField(file, fields.field(), fields.what());
}

std::optional<DType> DTypeOfName(const std::string& name) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return std::nullopt;
}

std::string Indexed(const char* name, size_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

void TakeName(JsonFields& fields, const std::string& field,
              const std::string& expected) {
  // No other name is ever opened, whatever the file says.
  if (fields.String(field, 255) != expected) {
    fields.Refuse(field, "is not " + expected);
  }
}

}  // namespace

std::string DataName(int rank) { return RankName(rank, "data"); }
std::string TableName(int rank) { return RankName(rank, "json"); }

std::string TableText(const StateTable& table) {
  Json pieces = Json::array();
  for (const StatePiece& piece : table.pieces) {
    pieces.push_back({{"vector", piece.vector},
                      {"dtype", DTypeName(piece.dtype)},
                      {"begin", piece.begin},
                      {"count", piece.count}});
  }
  return SealJson({{"rank", table.rank},
                   {"data", DataName(table.rank)},
                   {"data_bytes", table.data_bytes},
                   {"chunk_bytes", table.chunk_bytes},
                   {"chunk_digests", table.chunk_digests},
                   {"pieces", std::move(pieces)}});
}

absl::StatusOr<StateTable> ParseTable(const std::string& text, int rank,
                                      int64_t data_bytes) {
  const std::string file = TableName(rank);
  GW_ASSIGN_OR_RETURN(auto unsealed, UnsealJson(text, file, kMaxDepth));
  JsonFields fields(unsealed.first);
  StateTable table;
  table.rank = static_cast<int>(fields.Integer("rank", rank, rank));
  TakeName(fields, "data", DataName(rank));
  table.data_bytes = fields.Integer("data_bytes", 0, INT64_MAX);
  table.chunk_bytes = fields.Integer("chunk_bytes", 1, INT64_MAX);
  fields.String("digest", kDigestDigits);
  const Json* digests = fields.Array("chunk_digests");
  const Json* pieces = fields.Array("pieces");
  if (!fields.Done()) return Wrong(file, fields);
  if (table.data_bytes != data_bytes) {
    return CorruptField(DataName(rank), "bytes",
                        "are " + std::to_string(data_bytes) + ", not " +
                            std::to_string(table.data_bytes));
  }

  const int64_t num_chunks = data_bytes / table.chunk_bytes +
                             (data_bytes % table.chunk_bytes != 0 ? 1 : 0);
  if (std::ssize(*digests) != num_chunks) {
    return CorruptField(file, "chunk_digests",
                        "are not " + std::to_string(num_chunks));
  }
  for (const Json& digest : *digests) {
    if (!digest.is_string() ||
        !IsDigest(digest.get_ref<const std::string&>())) {
      return CorruptField(file,
                          Indexed("chunk_digests", table.chunk_digests.size()),
                          "is not a digest");
    }
    table.chunk_digests.push_back(digest.get<std::string>());
  }

  int64_t bytes_left = data_bytes;
  for (const Json& each : *pieces) {
    const std::string place = Indexed("pieces", table.pieces.size());
    JsonFields piece_fields(each, place + ".");
    StatePiece piece;
    piece.vector = piece_fields.String("vector", 16);
    const auto dtype = DTypeOfName(piece_fields.String("dtype", 8));
    if (!dtype.has_value()) piece_fields.Refuse("dtype", "is not known");
    piece.dtype = dtype.value_or(DType::kF32);
    piece.begin = piece_fields.Integer("begin", 0, kMaxStateElements);
    piece.count = piece_fields.Integer("count", 1, kMaxStateElements);
    if (!piece_fields.Done()) return Wrong(file, piece_fields);
    bytes_left -= piece.count * DTypeBytes(piece.dtype);
    if (bytes_left < 0) {
      return CorruptField(file, place, "lies outside the data");
    }
    table.pieces.push_back(std::move(piece));
  }
  if (bytes_left != 0) {
    return CorruptField(file, "pieces", "are fewer bytes than the data");
  }
  return table;
}

std::string ManifestText(const StateManifest& manifest) {
  Json ranks = Json::array();
  for (const StateManifest::Rank& rank : manifest.ranks) {
    ranks.push_back({{"table", TableName(static_cast<int>(ranks.size()))},
                     {"table_bytes", rank.table_bytes},
                     {"table_digest", rank.table_digest}});
  }
  const StateHeader& header = manifest.header;
  return SealJson({{"format", kStateFormat},
                   {"version", kStateVersion},
                   {"num_parameters", header.num_parameters},
                   {"model_digest", header.model_digest},
                   {"optimizer_step", header.optimizer_step},
                   {"weight_version", header.weight_version},
                   {"attributes", header.attributes},
                   {"ranks", std::move(ranks)}});
}

absl::StatusOr<StateManifest> ParseManifest(const std::string& text) {
  GW_ASSIGN_OR_RETURN(auto unsealed,
                      UnsealJson(text, kManifestName, kMaxDepth));
  StateManifest manifest;
  manifest.digest = std::move(unsealed.second);
  JsonFields fields(unsealed.first);
  TakeName(fields, "format", kStateFormat);
  const int64_t version = fields.Integer("version", 1, INT64_MAX);
  if (!fields.what().empty()) return Wrong(kManifestName, fields);
  // Before anything that another version may have changed.
  if (version != kStateVersion) {
    return WrongVersion(version, kStateVersion);
  }
  StateHeader& header = manifest.header;
  header.num_parameters =
      fields.Integer("num_parameters", 1, kMaxStateElements);
  header.model_digest = fields.String("model_digest", kMaxHeaderBytes);
  header.optimizer_step = fields.Integer("optimizer_step", 0, INT64_MAX);
  header.weight_version = fields.Integer("weight_version", 0, INT64_MAX);
  fields.String("digest", kDigestDigits);
  const Json* attributes = fields.Object("attributes");
  const Json* ranks = fields.Array("ranks");
  if (!fields.Done()) return Wrong(kManifestName, fields);
  JsonFields attribute_fields(*attributes, "attributes.");
  for (const auto& [name, value] : attributes->items()) {
    header.attributes[name] = attribute_fields.String(name, kMaxHeaderBytes);
  }
  if (!attribute_fields.Done()) return Wrong(kManifestName, attribute_fields);
  if (ranks->empty() || std::ssize(*ranks) > kMaxRanks) {
    return CorruptField(kManifestName, "ranks", "are none, or too many");
  }
  for (const Json& each : *ranks) {
    const int number = static_cast<int>(manifest.ranks.size());
    JsonFields rank_fields(each, Indexed("ranks", manifest.ranks.size()) + ".");
    StateManifest::Rank rank;
    TakeName(rank_fields, "table", TableName(number));
    rank.table_bytes = rank_fields.Integer("table_bytes", 1, kMaxTableBytes);
    rank.table_digest = rank_fields.String("table_digest", kDigestDigits);
    if (!rank_fields.Done()) return Wrong(kManifestName, rank_fields);
    manifest.ranks.push_back(std::move(rank));
  }
  return manifest;
}

absl::Status CorruptChunk(const std::string& file, int64_t chunk,
                          const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kDataLoss, "CHECKPOINT_CORRUPT")
      .Server()
      .With("file", file)
      .With("chunk", chunk)
      .Message("the checkpoint is damaged: " + file + ": chunk " +
               std::to_string(chunk) + " " + what + "; load an older one");
}

}  // namespace gradwire
