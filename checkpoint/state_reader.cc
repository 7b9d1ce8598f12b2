// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <set>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/state_format.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

constexpr int64_t kWindowBytes = int64_t{1} << 20;
// One that is replaced more often while it is opened.
constexpr int kMostReplacements = 16;

// Of a directory without a manifest.
absl::Status WhatIsThere(FileSystem& files, const std::string& directory) {
  const auto names = files.List(directory);
  if (absl::IsNotFound(names.status())) return CheckpointNotFound();
  GW_RETURN_IF_ERROR(names.status());
  if (names->empty()) return CheckpointNotFound();
  const std::set<std::string> all(names->begin(), names->end());
  if (all.contains(TableName(0)) || all.contains(DataName(0))) {
    return CorruptField(kManifestName, "", "is missing");
  }
  return ErrorBuilder(absl::StatusCode::kInvalidArgument,
                      "CHECKPOINT_KIND_MISMATCH")
      .With("field", "name")
      .Message(
          "this is not the checkpoint of a training; a directory with "
          "weights alone, a Hugging Face model for example, is loaded as "
          "base model");
}

}  // namespace

struct StateReader::RankFile {
  StateTable table;
  std::vector<bool> is_verified;  // by chunk
  std::unique_ptr<File> data;     // opened when it is first read
};

absl::StatusOr<std::unique_ptr<StateReader>> StateReader::Open(
    FileSystem& files, const std::string& directory) {
  for (int tries = 0;; ++tries) {
    std::unique_ptr<StateReader> reader(new StateReader(files, directory));
    absl::Status loaded = reader->Load();
    // Of what was replaced meanwhile, this and that may have been read.
    if (tries < kMostReplacements && !reader->manifest_digest_.empty()) {
      const auto there = reader->IsThere();
      if (there.ok() && !*there) continue;
      loaded.Update(there.status());
    }
    if (!loaded.ok()) return reader->WithName(loaded);
    return reader;
  }
}

absl::StatusOr<bool> StateReader::IsThere() const {
  auto text =
      ReadStateFile(files_, directory_, kManifestName, kMaxManifestBytes);
  // Deleted, or just being replaced: what is open is what there was.
  if (absl::IsNotFound(text.status())) return true;
  GW_RETURN_IF_ERROR(text.status());
  return DigestOf(*text) == manifest_digest_;
}

absl::Status StateReader::OpenData(RankFile& file, int rank) {
  GW_ASSIGN_OR_RETURN(std::unique_ptr<File> data,
                      files_.Open(directory_ + "/" + DataName(rank),
                                  FileSystem::Access::kRead));
  GW_ASSIGN_OR_RETURN(const bool there, IsThere());
  if (!there) {
    return ErrorBuilder(absl::StatusCode::kAborted, "CHECKPOINT_REPLACED")
        .With("checkpoint", LastSegment(directory_))
        .Message(
            "another checkpoint has taken the place of this one while it was "
            "read; try again");
  }
  file.data = std::move(data);
  return absl::OkStatus();
}

StateReader::StateReader(FileSystem& files, std::string directory)
    : files_(files), directory_(std::move(directory)) {}

StateReader::~StateReader() = default;

absl::Status StateReader::WithName(const absl::Status& status) const {
  return WithErrorMetadata(status, "checkpoint", LastSegment(directory_));
}

absl::StatusOr<StateHeader> ReadStateHeader(FileSystem& files,
                                            const std::string& directory,
                                            std::string* digest) {
  auto text = ReadStateFile(files, directory, kManifestName, kMaxManifestBytes);
  if (absl::IsNotFound(text.status())) return WhatIsThere(files, directory);
  GW_RETURN_IF_ERROR(text.status());
  GW_ASSIGN_OR_RETURN(StateManifest manifest, ParseManifest(*text));
  if (digest != nullptr) *digest = std::move(manifest.digest);
  return std::move(manifest.header);
}

absl::Status StateReader::Load() {
  auto text =
      ReadStateFile(files_, directory_, kManifestName, kMaxManifestBytes);
  if (absl::IsNotFound(text.status())) return WhatIsThere(files_, directory_);
  GW_RETURN_IF_ERROR(text.status());
  manifest_digest_ = DigestOf(*text);
  GW_ASSIGN_OR_RETURN(StateManifest manifest, ParseManifest(*text));
  header_ = std::move(manifest.header);
  summary_ = {.bytes = std::ssize(*text), .digest = manifest.digest};
  std::vector<StateTable> tables;
  for (int rank = 0; rank < static_cast<int>(manifest.ranks.size()); ++rank) {
    GW_ASSIGN_OR_RETURN(
        StateTable table,
        LoadTable(rank, manifest.ranks[static_cast<size_t>(rank)].table_bytes,
                  manifest.ranks[static_cast<size_t>(rank)].table_digest));
    tables.push_back(std::move(table));
  }
  auto index = IndexPieces(header_.num_parameters, tables);
  if (!index.ok()) {
    return CorruptField(kManifestName, "ranks",
                        std::string(index.status().message()));
  }
  index_ = std::make_unique<StateIndex>(*std::move(index));
  for (StateTable& table : tables) {
    RankFile& file = ranks_.emplace_back();
    file.is_verified.resize(table.chunk_digests.size());
    file.table = std::move(table);
  }
  return absl::OkStatus();
}

absl::StatusOr<StateTable> StateReader::LoadTable(int rank, int64_t bytes,
                                                  const std::string& digest) {
  const std::string name = TableName(rank);
  auto text = ReadStateFile(files_, directory_, name, kMaxTableBytes);
  if (absl::IsNotFound(text.status())) {
    return CorruptField(name, "", "is missing");
  }
  GW_RETURN_IF_ERROR(text.status());
  if (std::ssize(*text) != bytes || DigestOf(*text) != digest) {
    return CorruptField(name, "digest", "is not that in the manifest");
  }
  const auto data = files_.Stat(directory_ + "/" + DataName(rank));
  if (absl::IsNotFound(data.status())) {
    return CorruptField(DataName(rank), "", "is missing");
  }
  GW_RETURN_IF_ERROR(data.status());
  summary_.bytes += bytes + data->bytes;
  return ParseTable(*text, rank, data->bytes);
}

int StateReader::world() const { return static_cast<int>(ranks_.size()); }

std::optional<DType> StateReader::dtype(const std::string& vector) const {
  const auto found = index_->vectors.find(vector);
  if (found == index_->vectors.end()) return std::nullopt;
  return found->second.dtype;
}

absl::Status StateReader::Verify(const std::string& vector, int64_t begin,
                                 int64_t count) {
  return WithName(Visit(vector, begin, count, nullptr));
}

absl::Status StateReader::Read(const std::string& vector, int64_t begin,
                               int64_t count, void* out) {
  return WithName(Visit(vector, begin, count, static_cast<char*>(out)));
}

absl::Status StateReader::Visit(const std::string& vector, int64_t begin,
                                int64_t count, char* out) {
  const auto found = index_->vectors.find(vector);
  if (found == index_->vectors.end()) {
    return PiecesInvalid(vector, begin, "is not in the checkpoint");
  }
  if (begin < 0 || begin > header_.num_parameters) {
    return PiecesInvalid(vector, begin, "begins outside of the model");
  }
  if (count < 0 || count > header_.num_parameters - begin) {
    return PiecesInvalid(vector, count, "has a count that ends outside of it");
  }
  const int64_t element = DTypeBytes(found->second.dtype);
  const std::vector<StateIndex::Segment>& segments = found->second.segments;
  // The last one that does not begin behind `begin`.
  auto segment = std::upper_bound(
      segments.begin(), segments.end(), begin,
      [](int64_t at, const auto& next) { return at < next.begin; });
  for (--segment; count > 0; ++segment) {
    const int64_t skipped = begin - segment->begin;
    const int64_t taken = std::min(count, segment->count - skipped);
    const int64_t offset = segment->offset + skipped * element;
    GW_RETURN_IF_ERROR(
        VisitBytes(segment->rank, offset, offset + taken * element, out));
    if (out != nullptr) out += taken * element;
    begin += taken;
    count -= taken;
  }
  return absl::OkStatus();
}

absl::Status StateReader::VisitBytes(int rank, int64_t begin, int64_t end,
                                     char* out) {
  RankFile& file = ranks_[static_cast<size_t>(rank)];
  if (file.data == nullptr) GW_RETURN_IF_ERROR(OpenData(file, rank));
  const int64_t chunk_bytes = file.table.chunk_bytes;
  while (begin < end) {
    const int64_t chunk = begin / chunk_bytes;
    const int64_t chunk_begin = chunk * chunk_bytes;
    // Not begin + chunk_bytes: a file may declare any number.
    const int64_t chunk_end =
        chunk_begin +
        std::min(chunk_bytes, file.table.data_bytes - chunk_begin);
    const int64_t part_end = std::min(end, chunk_end);
    if (!file.is_verified[static_cast<size_t>(chunk)]) {
      GW_RETURN_IF_ERROR(VerifyChunk(file, chunk, {chunk_begin, chunk_end},
                                     {begin, part_end}, out));
      file.is_verified[static_cast<size_t>(chunk)] = true;
    } else if (out != nullptr) {
      GW_RETURN_IF_ERROR(ReadExactly(file, begin, part_end - begin, out));
    }
    if (out != nullptr) out += part_end - begin;
    begin = part_end;
  }
  return absl::OkStatus();
}

absl::Status StateReader::VerifyChunk(RankFile& file, int64_t chunk,
                                      ByteRange all, ByteRange wanted,
                                      char* out) {
  StreamDigest digest;
  for (int64_t at = all.begin; at < all.end;) {
    int64_t bytes = std::min(all.end - at, kWindowBytes);
    // What is wanted is read to its place, the rest to the window: the bytes
    // that are handed out are those that were verified.
    char* place = window_.data();
    if (out != nullptr && at < wanted.end) {
      if (at < wanted.begin) {
        bytes = std::min(bytes, wanted.begin - at);
      } else {
        bytes = std::min(bytes, wanted.end - at);
        place = out + (at - wanted.begin);
      }
    }
    if (place == window_.data() && std::ssize(window_) < bytes) {
      window_.resize(static_cast<size_t>(bytes));
      place = window_.data();
    }
    GW_RETURN_IF_ERROR(ReadExactly(file, at, bytes, place));
    digest.Add(std::string_view(place, static_cast<size_t>(bytes)));
    at += bytes;
  }
  if (digest.Take() == file.table.chunk_digests[static_cast<size_t>(chunk)]) {
    return absl::OkStatus();
  }
  return CorruptChunk(DataName(file.table.rank), chunk,
                      "is not what was written");
}

absl::Status StateReader::ReadExactly(RankFile& file, int64_t offset,
                                      int64_t bytes, char* out) {
  GW_ASSIGN_OR_RETURN(const int64_t got, file.data->ReadAt(offset, bytes, out));
  if (got == bytes) return absl::OkStatus();
  return CorruptChunk(DataName(file.table.rank),
                      offset / file.table.chunk_bytes, "ends too early");
}

}  // namespace gradwire
