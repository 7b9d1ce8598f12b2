// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/snapshot/manifest.h"

#include <algorithm>
#include <cstdio>
#include <string_view>
#include <utility>

#include "base/status.h"
#include "checkpoint/sealed_text.h"
#include "checkpoint/strict_json.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

constexpr char kFormat[] = "gradwire snapshot";
// Of one whose weights are in shards, which version 1 does not know, and of
// others.
constexpr int kShardedVersion = 2;
constexpr int kVersion = 1;
// Manifest, array, object, and one to spare for later versions.
constexpr int kMaxDepth = 4;
constexpr int64_t kMaxManifestBytes = int64_t{1} << 20;
constexpr int64_t kMaxText = 4096;
constexpr std::string_view kWeightsEnd = ".safetensors";
constexpr std::string_view kIndexEnd = ".safetensors.index.json";
constexpr char kTimeFormat[] = "%Y-%m-%dT%H:%M:%E6SZ";

absl::Status Wrong(const std::string& field, const std::string& what) {
  return CorruptField(kSnapshotManifest, field, what);
}

// Whatever the manifest says, no file outside its directory is ever opened.
bool IsSegment(const std::string& name) {
  return !name.empty() && name.size() <= 128 && name[0] != '.' &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                  (c >= 'A' && c <= 'Z') || c == '.' || c == '_' || c == '-';
         });
}

void TakeId(JsonFields& fields, const char* name, std::string& id) {
  id = fields.String(name, kDigestDigits);
  if (!IsDigest(id)) fields.Refuse(name, "is not a weight id");
}

int64_t TakeTime(JsonFields& fields, const char* name, bool optional) {
  const std::string text = fields.String(name, 64);
  if (text.empty() && optional) return 0;
  const int64_t micros = ParseMicros(text);
  if (micros <= 0) fields.Refuse(name, "is not a time");
  return micros;
}

absl::StatusOr<std::vector<SnapshotFile>> ParseFiles(const Json& files) {
  std::vector<SnapshotFile> parsed;
  int64_t bytes_left = INT64_MAX;
  for (const Json& each : files) {
    JsonFields fields(each, "files[" + std::to_string(parsed.size()) + "].");
    SnapshotFile file;
    file.name = fields.String("name", 128);
    // All of them have a sum.
    file.bytes = fields.Integer("bytes", 0, bytes_left);
    bytes_left -= file.bytes;
    file.digest = fields.String("digest", kDigestDigits);
    const bool twice =
        std::any_of(parsed.begin(), parsed.end(),
                    [&](const auto& other) { return other.name == file.name; });
    if (!IsSegment(file.name) || file.name == kSnapshotManifest || twice) {
      fields.Refuse("name", "is not the name of one more file");
    }
    if (!IsDigest(file.digest)) fields.Refuse("digest", "is not a digest");
    if (!fields.Done()) return Wrong(fields.field(), fields.what());
    parsed.push_back(std::move(file));
  }
  return parsed;
}

// That the files with weights are those of the kind, each of them, in order.
absl::Status CheckWeights(const SnapshotManifest& manifest) {
  const bool sharded = manifest.Find(kBaseIndex) != nullptr;
  std::vector<std::string> have, want;
  for (const SnapshotFile& file : manifest.files) {
    if (NamesWeights(file.name) && file.name != kBaseIndex) {
      have.push_back(file.name);
    }
  }
  if (manifest.is_delta) {
    want.push_back(kDeltaWeights);
  } else if (!sharded) {
    want.push_back(kBaseWeights);
  } else if (std::ssize(have) > 1 && std::ssize(have) <= kMaxShards) {
    for (int64_t i = 1; i <= std::ssize(have); ++i) {
      want.push_back(BaseWeightsName(i, std::ssize(have)));
    }
  }
  if (want.empty() || have != want || (manifest.is_delta && sharded)) {
    return Wrong("files", "have not the weights, or others");
  }
  return absl::OkStatus();
}

int VersionOf(const SnapshotManifest& manifest) {
  return manifest.Find(kBaseIndex) != nullptr ? kShardedVersion : kVersion;
}

}  // namespace

std::string BaseWeightsName(int64_t number, int64_t count) {
  if (count == 1) return kBaseWeights;
  char name[64];
  std::snprintf(name, sizeof(name), "model-%05lld-of-%05lld.safetensors",
                static_cast<long long>(number), static_cast<long long>(count));
  return name;
}

bool NamesWeights(const std::string& file) {
  return file.ends_with(kWeightsEnd) || file.ends_with(kIndexEnd);
}

const SnapshotFile* SnapshotManifest::Find(const std::string& file) const {
  const auto found =
      std::find_if(files.begin(), files.end(),
                   [&](const auto& each) { return each.name == file; });
  return found == files.end() ? nullptr : &*found;
}

std::vector<SnapshotFile> SnapshotManifest::weights() const {
  std::vector<SnapshotFile> weights;
  for (const SnapshotFile& file : files) {
    if (file.name.ends_with(kWeightsEnd)) weights.push_back(file);
  }
  return weights;
}

int64_t SnapshotManifest::weight_bytes() const {
  int64_t sum = 0;
  for (const SnapshotFile& file : weights()) sum += file.bytes;
  return sum;
}

std::string SnapshotManifest::weight_digest() const {
  std::string digests;
  for (const SnapshotFile& file : weights()) digests += file.digest;
  return std::ssize(digests) == kDigestDigits ? digests : DigestOf(digests);
}

int64_t SnapshotManifest::bytes() const {
  int64_t sum = 0;
  for (const SnapshotFile& file : files) sum += file.bytes;
  return sum;
}

std::string SnapshotText(const SnapshotManifest& manifest) {
  Json files = Json::array();
  for (const SnapshotFile& file : manifest.files) {
    files.push_back(
        {{"name", file.name}, {"bytes", file.bytes}, {"digest", file.digest}});
  }
  Json json = {{"format", kFormat},
               {"version", VersionOf(manifest)},
               {"name", manifest.name},
               {"job", manifest.job},
               {"kind", manifest.kind()},
               {"weight_version", manifest.weight_version},
               {"optimizer_step", manifest.optimizer_step},
               {"weight_id", manifest.weight_id},
               {"base_model", manifest.base_model},
               {"dtype", manifest.dtype},
               {"operation", manifest.operation},
               {"created", FormatMicros(manifest.created_micros)},
               {"expires", manifest.expires_micros == 0
                               ? ""
                               : FormatMicros(manifest.expires_micros)},
               {"files", std::move(files)}};
  if (manifest.is_delta) {
    json["parent"] = manifest.parent;
    json["parent_id"] = manifest.parent_id;
    json["base_id"] = manifest.base_id;
    json["chain_length"] = manifest.chain_length;
  }
  return SealJson(json);
}

absl::StatusOr<SnapshotManifest> ParseSnapshot(const std::string& text) {
  GW_ASSIGN_OR_RETURN(auto unsealed,
                      UnsealJson(text, kSnapshotManifest, kMaxDepth));
  SnapshotManifest manifest;
  manifest.digest = std::move(unsealed.second);
  JsonFields fields(unsealed.first);
  if (fields.String("format", 64) != kFormat) {
    fields.Refuse("format", "is not that of a snapshot");
  }
  const int64_t version = fields.Integer("version", 1, INT64_MAX);
  if (!fields.what().empty()) return Wrong(fields.field(), fields.what());
  // Before anything that another version may have changed.
  if (version > kShardedVersion) return WrongVersion(version, kShardedVersion);
  manifest.name = fields.String("name", 128);
  manifest.job = fields.String("job", 128);
  const std::string kind = fields.String("kind", 16);
  manifest.is_delta = kind == "delta";
  if (!manifest.is_delta && kind != "base") {
    fields.Refuse("kind", "is not known");
  }
  manifest.weight_version = fields.Integer("weight_version", 0, INT64_MAX);
  manifest.optimizer_step = fields.Integer("optimizer_step", 0, INT64_MAX);
  TakeId(fields, "weight_id", manifest.weight_id);
  manifest.base_id = manifest.weight_id;
  if (manifest.is_delta) {
    manifest.parent = fields.String("parent", 128);
    if (!IsSegment(manifest.parent)) {
      fields.Refuse("parent", "is not the name of a snapshot");
    }
    TakeId(fields, "parent_id", manifest.parent_id);
    TakeId(fields, "base_id", manifest.base_id);
    manifest.chain_length = fields.Integer("chain_length", 1, INT64_MAX);
  }
  manifest.base_model = fields.String("base_model", kMaxText);
  manifest.dtype = fields.String("dtype", 16);
  manifest.operation = fields.String("operation", kMaxText);
  manifest.created_micros = TakeTime(fields, "created", false);
  manifest.expires_micros = TakeTime(fields, "expires", true);
  fields.String("digest", kDigestDigits);
  const Json* files = fields.Array("files");
  if (!fields.Done()) return Wrong(fields.field(), fields.what());
  GW_ASSIGN_OR_RETURN(manifest.files, ParseFiles(*files));
  GW_RETURN_IF_ERROR(CheckWeights(manifest));
  if (version != VersionOf(manifest)) {
    return Wrong("version", "is not that of its files");
  }
  return manifest;
}

absl::StatusOr<SnapshotManifest> ReadSnapshot(FileSystem& files,
                                              const std::string& directory,
                                              const std::string& name) {
  const std::string path = directory + "/" + name;
  const auto info = files.Stat(path);
  if (absl::IsNotFound(info.status()) || (info.ok() && !info->is_directory)) {
    return CheckpointNotFound();
  }
  GW_RETURN_IF_ERROR(info.status());
  auto text = ReadStateFile(files, path, kSnapshotManifest, kMaxManifestBytes);
  if (absl::IsNotFound(text.status())) {
    // It may have been deleted since.
    if (absl::IsNotFound(files.Stat(path).status())) {
      return CheckpointNotFound();
    }
    return Wrong("", "is missing");
  }
  GW_RETURN_IF_ERROR(text.status());
  GW_ASSIGN_OR_RETURN(SnapshotManifest manifest, ParseSnapshot(*text));
  if (manifest.name != name) return Wrong("name", "is not the directory's");
  return manifest;
}

std::string FormatMicros(int64_t micros) {
  return absl::FormatTime(kTimeFormat, absl::FromUnixMicros(micros),
                          absl::UTCTimeZone());
}

int64_t ParseMicros(const std::string& text) {
  absl::Time time;
  std::string ignored;
  if (!absl::ParseTime(kTimeFormat, text, absl::UTCTimeZone(), &time,
                       &ignored)) {
    return 0;
  }
  const int64_t micros = absl::ToUnixMicros(time);
  return FormatMicros(micros) == text ? micros : 0;
}

}  // namespace gradwire
