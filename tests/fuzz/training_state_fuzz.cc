// SPDX-License-Identifier: Apache-2.0
// A checkpoint of a training: the manifest, the tables of two ranks and their
// data, with a zero byte behind each text. The data is halved between the
// ranks.
#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/check.h"
#include "checkpoint/state_format.h"
#include "checkpoint/training_state.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/memory_files.h"

namespace gradwire {
namespace {

constexpr size_t kRanks = 2;

struct Parts {
  std::string manifest;
  std::array<std::string, kRanks> tables;
  std::array<std::string, kRanks> data;
};

Parts Split(const std::string& input) {
  Parts parts;
  size_t at = 0;
  const auto take = [&] {
    const size_t end = std::min(input.find('\0', at), input.size());
    std::string text = input.substr(at, end - at);
    at = std::min(end + 1, input.size());
    return text;
  };
  parts.manifest = take();
  for (std::string& table : parts.tables) table = take();
  const size_t half = (input.size() - at + 1) / 2;
  parts.data = {input.substr(at, half), input.substr(at + half)};
  return parts;
}

std::string Join(const Parts& parts) {
  std::string input = parts.manifest + '\0';
  for (const std::string& table : parts.tables) input += table + '\0';
  return input + parts.data[0] + parts.data[1];
}

// Where the value of a member stands, the `nth` of this name; empty at the end
// if there is none. In the text, for a parser would take most of the time.
std::pair<size_t, size_t> FindValue(const std::string& text,
                                    const std::string& name, int64_t nth) {
  const std::string key = '"' + name + "\":";
  size_t at = text.find(key);
  for (; nth > 0 && at != std::string::npos; --nth) {
    at = text.find(key, at + 1);
  }
  if (at == std::string::npos) return {text.size(), text.size()};
  const size_t begin =
      std::min(text.find_first_not_of(' ', at + key.size()), text.size());
  const bool list = begin < text.size() && text[begin] == '[';
  const size_t end = text.find_first_of(list ? "]" : ",}\n", begin);
  return {begin, std::min(end, text.size()) + (list ? 1 : 0)};
}

void Put(std::string& text, const std::string& name, int64_t nth,
         const std::string& value) {
  const auto [begin, end] = FindValue(text, name, nth);
  if (begin < end && end <= text.size()) {
    text.replace(begin, end - begin, value);
  }
}

std::string Quoted(const std::string& text) { return '"' + text + '"'; }

// Makes digests of chunks and sizes those of the data.
void SealTable(std::string& table, const std::string& data) {
  const auto [begin, end] = FindValue(table, "chunk_bytes", 0);
  int64_t chunk_bytes = 0;
  std::from_chars(table.data() + begin, table.data() + end, chunk_bytes);
  if (chunk_bytes <= 0) return;
  std::string digests;
  for (size_t at = 0; at < data.size();) {
    const std::string chunk = data.substr(at, static_cast<size_t>(chunk_bytes));
    digests += (digests.empty() ? "" : ",") + Quoted(DigestOf(chunk));
    at += chunk.size();
  }
  Put(table, "chunk_digests", 0, "[" + digests + "]");
  Put(table, "data_bytes", 0, std::to_string(data.size()));
  Seal(table);
}

void SealManifest(Parts& parts) {
  for (size_t i = 0; i < kRanks; ++i) {
    const auto nth = static_cast<int64_t>(i);
    const std::string& table = parts.tables[i];
    Put(parts.manifest, "table_bytes", nth, std::to_string(table.size()));
    Put(parts.manifest, "table_digest", nth, Quoted(DigestOf(table)));
  }
  Seal(parts.manifest);
}

bool SameHeader(const StateHeader& a, const StateHeader& b) {
  return a.num_parameters == b.num_parameters &&
         a.model_digest == b.model_digest &&
         a.optimizer_step == b.optimizer_step &&
         a.weight_version == b.weight_version && a.attributes == b.attributes;
}

void CheckManifest(const StateManifest& manifest) {
  const auto again = ParseManifest(ManifestText(manifest));
  GW_CHECK(again.ok());
  GW_CHECK(SameHeader(again->header, manifest.header));
  GW_CHECK(std::equal(again->ranks.begin(), again->ranks.end(),
                      manifest.ranks.begin(), manifest.ranks.end(),
                      [](const auto& a, const auto& b) {
                        return a.table_bytes == b.table_bytes &&
                               a.table_digest == b.table_digest;
                      }));
}

void CheckTable(const std::string& text, int rank, int64_t data_bytes) {
  const auto table = ParseTable(text, rank, data_bytes);
  GW_CHECK(table.ok());
  const auto again = ParseTable(TableText(*table), rank, data_bytes);
  GW_CHECK(again.ok());
  GW_CHECK(again->chunk_digests == table->chunk_digests &&
           again->chunk_bytes == table->chunk_bytes &&
           again->pieces.size() == table->pieces.size());
  int64_t bytes = 0;
  for (const StatePiece& piece : table->pieces) {
    bytes += piece.count * DTypeBytes(piece.dtype);
  }
  GW_CHECK(bytes == data_bytes);
}

// Of each vector: what is read at once is what is read in parts, and Verify
// says of it what Read does.
void CheckVectors(FileSystem& files, StateReader& reader) {
  const int64_t count = reader.header().num_parameters;
  GW_CHECK(reader.dtype("weight") == DType::kF32);
  GW_CHECK(reader.dtype("m").has_value() == reader.dtype("v").has_value());
  const auto verifier = StateReader::Open(files, "/c");
  GW_CHECK(verifier.ok());
  for (const std::string vector : {"weight", "m", "v"}) {
    const auto dtype = reader.dtype(vector);
    if (!dtype.has_value()) continue;
    // All elements are in the files.
    const int64_t element = DTypeBytes(*dtype);
    std::string whole(static_cast<size_t>(count * element), '\0');
    const absl::Status read = reader.Read(vector, 0, count, whole.data());
    GW_CHECK((*verifier)->Verify(vector, 0, count).ok() == read.ok());
    GW_CHECK(!reader.Read(vector, 1, count, whole.data()).ok());
    if (!read.ok()) {
      CheckRefusal(read);
      continue;
    }
    // Cut anywhere, and so where pieces end.
    for (int64_t cut = 0; cut < std::min<int64_t>(count, 8); ++cut) {
      std::string parts(whole.size(), '\0');
      char* rest = parts.data() + cut * element;
      GW_CHECK(reader.Read(vector, cut, count - cut, rest).ok());
      GW_CHECK(reader.Read(vector, 0, cut, parts.data()).ok());
      GW_CHECK(parts == whole);
    }
  }
}

}  // namespace

std::string FuzzSeed(Dice& dice) {
  Parts parts;
  // The ranks' data is of the same length.
  const int64_t half = 1 + dice.Below(4), count = 2 * half;
  const DType moments = dice.OneIn(2) ? DType::kF32 : DType::kBF16;
  std::array<StateTable, kRanks> tables;
  tables[0].pieces = {{"weight", DType::kF32, half, half}};
  tables[1].pieces = {{"weight", DType::kF32, 0, half}};
  if (half > 1 && dice.OneIn(2)) {
    tables[0].pieces = {{"weight", DType::kF32, half + 1, half - 1},
                        {"weight", DType::kF32, half, 1}};
  }
  if (dice.OneIn(2)) {
    tables[0].pieces.push_back({"v", moments, 0, count});
    tables[1].pieces.push_back({"m", moments, 0, count});
  }
  StateManifest manifest;
  manifest.header = {.num_parameters = count,
                     .model_digest = "d",
                     .optimizer_step = 3,
                     .weight_version = 4,
                     .attributes = {{"a", "b"}}};
  manifest.ranks.resize(kRanks);
  for (size_t rank = 0; rank < kRanks; ++rank) {
    tables[rank].rank = static_cast<int>(rank);
    tables[rank].chunk_bytes = 1 + dice.Below(20);
    int64_t bytes = 0;
    for (const StatePiece& piece : tables[rank].pieces) {
      bytes += piece.count * DTypeBytes(piece.dtype);
    }
    for (int64_t i = 0; i < bytes; ++i) {
      parts.data[rank].push_back(static_cast<char>('a' + dice.Below(26)));
    }
    parts.tables[rank] = TableText(tables[rank]);
    SealTable(parts.tables[rank], parts.data[rank]);
  }
  parts.manifest = ManifestText(manifest);
  SealManifest(parts);
  return Join(parts);
}

void FuzzMutate(std::string& input, Dice& dice) {
  if (dice.OneIn(20)) {
    MutatePart(input, dice);
    return;
  }
  Parts parts = Split(input);
  for (int64_t i = dice.Changes(); i > 0; --i) {
    if (dice.OneIn(3)) {
      MutateSealed(parts.manifest, dice);
    } else if (dice.OneIn(4)) {
      std::string data = parts.data[0] + parts.data[1];
      MutatePart(data, dice);
      const size_t half = (data.size() + 1) / 2;
      parts.data = {data.substr(0, half), data.substr(half)};
    } else {
      MutateSealed(parts.tables[static_cast<size_t>(dice.Below(kRanks))], dice);
    }
  }
  if (dice.OneIn(2)) {
    for (size_t i = 0; i < kRanks; ++i) {
      SealTable(parts.tables[i], parts.data[i]);
    }
  }
  if (!dice.OneIn(8)) SealManifest(parts);
  input = Join(parts);
}

void FuzzOne(const std::string& input) {
  const Parts parts = Split(input);
  std::map<std::string, std::string> contents = {
      {"/c/manifest.json", parts.manifest}};
  for (size_t rank = 0; rank < kRanks; ++rank) {
    const int number = static_cast<int>(rank);
    contents["/c/" + TableName(number)] = parts.tables[rank];
    contents["/c/" + DataName(number)] = parts.data[rank];
  }
  MemoryFiles files(std::move(contents));
  absl::StatusOr<std::unique_ptr<StateReader>> reader;
  {
    const BoundedMemory bound(20'000, 200, input.size());
    reader = StateReader::Open(files, "/c");
  }
  if (!reader.ok()) {
    CheckRefusal(reader.status());
    // Of some: the reader has read it already.
    if (input.size() % 4 != 0) return;
    const auto manifest = ParseManifest(parts.manifest);
    if (manifest.ok()) {
      CheckManifest(*manifest);
    } else {
      CheckRefusal(manifest.status());
    }
    return;
  }
  const auto manifest = ParseManifest(parts.manifest);
  GW_CHECK(manifest.ok());
  CheckManifest(*manifest);
  const auto header = ReadStateHeader(files, "/c");
  GW_CHECK(header.ok() && SameHeader(*header, manifest->header));
  GW_CHECK(SameHeader((*reader)->header(), manifest->header));
  // More than are here cannot be.
  const int world = (*reader)->world();
  GW_CHECK(world == std::ssize(manifest->ranks) && world <= int{kRanks});
  for (int rank = 0; rank < world; ++rank) {
    const auto at = static_cast<size_t>(rank);
    CheckTable(parts.tables[at], rank, std::ssize(parts.data[at]));
  }
  CheckVectors(files, **reader);
  CountAccepted();
}

}  // namespace gradwire
