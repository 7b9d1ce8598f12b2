// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/remote/remote_checkpoints.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/remote/sha256.h"
#include "checkpoint/strict_json.h"

namespace gradwire {
namespace {

constexpr int kFormat = 1;
constexpr const char* kCommit = "/commit.json";
constexpr std::string_view kFetching = ".fetching";
constexpr int64_t kMostCommitBytes = int64_t{64} << 20;
constexpr int64_t kMostFileBytes = int64_t{1} << 50;
constexpr int64_t kMostMicros = int64_t{1} << 60;
constexpr int64_t kMostText = 1024;

std::string NameOf(const std::string& key) {
  return key.substr(key.rfind('/') + 1);
}

absl::Status Corrupt(const std::string& key, const std::string& file,
                     const std::string& what) {
  return ErrorBuilder(absl::StatusCode::kDataLoss, "OBJECT_CORRUPT")
      .Server()
      .With("checkpoint", NameOf(key))
      .With("file", file)
      .Message("In the object store, " + file + " of " + NameOf(key) + " " +
               what +
               ". Use another checkpoint; delete this one, and store it again "
               "if there is still one on a disk.");
}

// Of a file beside others: never a way out of its directory.
bool IsFileName(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name[0] != '.' &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return std::isalnum(static_cast<unsigned char>(c)) != 0 ||
                  c == '-' || c == '.' || c == '_';
         });
}

std::string ToText(const RemoteCommit& commit) {
  nlohmann::json json = {{"format", kFormat},
                         {"epoch", commit.epoch},
                         {"folder", commit.folder},
                         {"digest", commit.digest},
                         {"parent", commit.parent},
                         {"created_micros", commit.created_micros},
                         {"files", nlohmann::json::array()}};
  for (const RemoteFile& file : commit.files) {
    json["files"].push_back(
        {{"name", file.name}, {"bytes", file.bytes}, {"sha256", file.sha256}});
  }
  return json.dump();
}

absl::StatusOr<RemoteCommit> Parse(const std::string& key,
                                   const std::string& text) {
  nlohmann::json json;
  const std::string wrong = ParseStrictJson(text, 4, &json);
  if (!wrong.empty()) return Corrupt(key, "commit.json", wrong);
  if (json.contains("format") && json["format"].is_number_integer() &&
      json["format"] > kFormat) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "STATE_VERSION")
        .Server()
        .With("have", json["format"].get<int64_t>())
        .With("need", kFormat)
        .Message(
            "A checkpoint in the object store was written by a newer version. "
            "Use that one.");
  }
  JsonFields fields(json);
  RemoteCommit commit;
  fields.Integer("format", kFormat, kFormat);
  commit.epoch = fields.Integer("epoch", 0, kMostMicros);
  commit.folder = fields.String("folder", kMostText);
  commit.digest = fields.String("digest", kMostText);
  commit.parent = fields.String("parent", kMostText);
  commit.created_micros = fields.Integer("created_micros", 0, kMostMicros);
  const nlohmann::json* files = fields.Array("files");
  std::set<std::string> names;
  for (size_t i = 0; files != nullptr && i < files->size(); ++i) {
    if (!(*files)[i].is_object()) {
      fields.Refuse("files", "holds something else than objects");
      break;
    }
    JsonFields one((*files)[i]);
    RemoteFile file;
    file.name = one.String("name", kMostText);
    file.bytes = one.Integer("bytes", 0, kMostFileBytes);
    file.sha256 = one.String("sha256", kMostText);
    if (!one.Done() || !IsFileName(file.name) ||
        !names.insert(file.name).second) {
      fields.Refuse("files", "holds something else than files");
      break;
    }
    commit.files.push_back(std::move(file));
  }
  if (!IsFileName(commit.folder)) fields.Refuse("folder", "is no name");
  if (!fields.Done()) {
    return Corrupt(key, "commit.json", fields.field() + " " + fields.what());
  }
  return commit;
}

}  // namespace

int64_t RemoteCommit::bytes() const {
  int64_t sum = 0;
  for (const RemoteFile& file : files) sum += file.bytes;
  return sum;
}

std::string RemoteCheckpoints::FolderOf(const std::string& digest) const {
  return server_ + "-" + std::to_string(epoch_) + "-" +
         Sha256::Of(digest).substr(0, 16);
}

bool RemoteCheckpoints::IsLeft(const std::string& folder) const {
  if (!folder.starts_with(server_ + "-")) return false;
  int64_t epoch = 0;
  const char* const end = folder.data() + folder.size();
  const auto [rest, error] =
      std::from_chars(folder.data() + server_.size() + 1, end, epoch);
  return error == std::errc() && rest != end && *rest == '-' && epoch < epoch_;
}

bool RemoteCheckpoints::IsOwn(const RemoteCommit& commit) const {
  return commit.folder.starts_with(server_ + "-") && commit.epoch <= epoch_;
}

void RemoteCheckpoints::DeleteFiles(const std::string& key,
                                    const RemoteCommit& commit) {
  for (const RemoteFile& file : commit.files) {
    (void)store_.Delete(key + "/" + commit.folder + "/" + file.name);
  }
}

absl::Status RemoteCheckpoints::Missing(const std::string& key) {
  return ErrorBuilder(absl::StatusCode::kNotFound,
                      "REMOTE_CHECKPOINT_NOT_FOUND")
      .With("value", NameOf(key))
      .Message("The object store has no checkpoint " + NameOf(key) + ".");
}

std::string FetchingPath(const std::string& directory) {
  const std::string name = NameOf(directory);
  return directory.substr(0, directory.size() - name.size()) + "." + name +
         std::string(kFetching);
}

absl::Status RemoveUnfinishedFetches(FileSystem& files,
                                     const std::string& parent) {
  const auto names = files.List(parent);
  if (absl::IsNotFound(names.status())) return absl::OkStatus();
  GW_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    if (!name.starts_with('.') || !name.ends_with(kFetching)) continue;
    GW_RETURN_IF_ERROR(RemoveIfThere(files, parent + "/" + name));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<RemoteCommit>> RemoteCheckpoints::Find(
    const std::string& key) {
  return Find(key, nullptr);
}

absl::StatusOr<std::optional<RemoteCommit>> RemoteCheckpoints::Find(
    const std::string& key, std::string* version) {
  const auto text = store_.Get(key + kCommit, kMostCommitBytes, version);
  if (absl::IsNotFound(text.status())) return std::nullopt;
  GW_RETURN_IF_ERROR(text.status());
  GW_ASSIGN_OR_RETURN(RemoteCommit commit, Parse(key, *text));
  return commit;
}

absl::StatusOr<std::vector<std::string>> RemoteCheckpoints::ListNames(
    const std::string& key) {
  GW_ASSIGN_OR_RETURN(const std::vector<std::string> keys,
                      store_.List(key + "/"));
  std::vector<std::string> names;
  for (const std::string& each : keys) {
    if (!each.ends_with(kCommit)) continue;
    const std::string name =
        each.substr(key.size() + 1,
                    each.size() - key.size() - 1 - std::string(kCommit).size());
    if (name.find('/') == std::string::npos) names.push_back(name);
  }
  return names;
}

absl::StatusOr<RemoteCommit> RemoteCheckpoints::Store(const std::string& key,
                                                      const Source& source) {
  const std::string& directory = source.directory;
  const auto as_good =
      [&](const RemoteCommit& there) -> absl::StatusOr<RemoteCommit> {
    if (there.digest == source.digest) return there;
    return ErrorBuilder(absl::StatusCode::kAlreadyExists,
                        "REMOTE_CHECKPOINT_EXISTS")
        .With("value", NameOf(key))
        .Message("The object store has another checkpoint " + NameOf(key) +
                 " of a job of this name. Delete one of them, or give each "
                 "server a prefix of its own.");
  };
  std::string version;
  GW_ASSIGN_OR_RETURN(const auto there, Find(key, &version));
  if (there.has_value()) {
    const bool gives_way = source.replaces && IsOwn(*there);
    if (!gives_way || there->digest == source.digest) return as_good(*there);
  }

  RemoteCommit commit;
  commit.epoch = epoch_;
  commit.folder = FolderOf(source.digest);
  commit.digest = source.digest;
  commit.parent = source.parent;
  commit.created_micros = source.created_micros;
  const std::string folder = key + "/" + commit.folder + "/";
  const auto store = [&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(const auto names, files_.List(directory));
    for (const std::string& name : names) {
      GW_ASSIGN_OR_RETURN(const auto info, files_.Stat(directory + "/" + name));
      if (info.is_directory || !IsFileName(name)) continue;
      GW_ASSIGN_OR_RETURN(
          const auto file,
          files_.Open(directory + "/" + name, FileSystem::Access::kRead));
      GW_ASSIGN_OR_RETURN(const std::string sha256,
                          store_.Upload(folder + name, *file, info.bytes));
      commit.files.push_back({name, info.bytes, sha256});
    }
    GW_RETURN_IF_ERROR(source.check());
    return there.has_value()
               ? store_.PutOver(key + kCommit, ToText(commit), version)
               : store_.PutNew(key + kCommit, ToText(commit));
  };
  const absl::Status stored = store();
  bool is_there = stored.ok();
  if (!is_there) {
    // The commit may have been taken before an answer was lost, or be another
    // server's.
    const auto now = Find(key);
    bool is_another = false;
    if (now.ok() && now->has_value()) {
      is_there = (*now)->folder == commit.folder;
      is_another =
          !is_there && !(there.has_value() && (*now)->folder == there->folder);
    }
    // A commit without an answer may still be taken, and needs its files. Of
    // one that is refused, or is half of another checkpoint, no try makes use.
    const bool is_final = absl::IsAborted(stored) || absl::IsNotFound(stored) ||
                          absl::IsAlreadyExists(stored);
    if (!is_there && (is_another || is_final)) DeleteFiles(key, commit);
    if (is_another) return as_good(**now);
  }
  if (!is_there) return stored;
  if (there.has_value()) DeleteFiles(key, *there);
  return commit;
}

absl::Status RemoteCheckpoints::FetchFiles(const std::string& key,
                                           const RemoteCommit& commit,
                                           const std::string& into) {
  for (const RemoteFile& file : commit.files) {
    GW_ASSIGN_OR_RETURN(const auto out, files_.Create(into + "/" + file.name));
    const auto sha256 = store_.Download(
        key + "/" + commit.folder + "/" + file.name, file.bytes, *out);
    if (absl::IsNotFound(sha256.status())) {
      return Corrupt(key, file.name, "is missing");
    }
    if (absl::IsDataLoss(sha256.status())) {
      return Corrupt(key, file.name,
                     "has another size than when it was stored");
    }
    GW_RETURN_IF_ERROR(sha256.status());
    if (*sha256 != file.sha256) {
      return Corrupt(key, file.name, "is not what was stored (SHA-256)");
    }
    GW_RETURN_IF_ERROR(out->Sync());
  }
  return files_.SyncDirectory(into);
}

absl::StatusOr<RemoteCommit> RemoteCheckpoints::Fetch(
    const std::string& key, const std::string& directory) {
  auto commit = Find(key);
  GW_RETURN_IF_ERROR(commit.status());
  while (commit->has_value()) {
    const absl::Status fetched = FetchAs(key, **commit, directory);
    if (fetched.ok()) return **commit;
    if (!absl::IsDataLoss(fetched)) return fetched;
    // It may have been replaced meanwhile.
    auto now = Find(key);
    GW_RETURN_IF_ERROR(now.status());
    if (now->has_value() && (*now)->folder == (*commit)->folder) return fetched;
    commit = std::move(now);
  }
  return Missing(key);
}

absl::Status RemoteCheckpoints::FetchAs(const std::string& key,
                                        const RemoteCommit& commit,
                                        const std::string& directory) {
  const std::string parent = DirectoryOf(directory);
  GW_ASSIGN_OR_RETURN(const int64_t free, files_.FreeBytes(parent));
  if (free < commit.bytes()) {
    return ErrorBuilder(absl::StatusCode::kResourceExhausted, "STORAGE_FULL")
        .With("needed", commit.bytes())
        .With("free", free)
        .Message("There is no space for the checkpoint " + NameOf(key) +
                 ". Delete others, and try again.");
  }
  const std::string into = FetchingPath(directory);
  GW_RETURN_IF_ERROR(RemoveIfThere(files_, into));
  GW_RETURN_IF_ERROR(files_.MakeDirectory(into));
  absl::Status status = FetchFiles(key, commit, into);
  if (status.ok()) status = files_.Rename(into, directory);
  if (!status.ok()) {
    // What cannot be removed now, RemoveUnfinishedFetches will.
    (void)RemoveIfThere(files_, into);
    return status;
  }
  return files_.SyncDirectory(parent);
}

absl::Status RemoteCheckpoints::Remove(const std::string& key) {
  // First what makes it visible.
  GW_RETURN_IF_ERROR(store_.Delete(key + kCommit));
  GW_ASSIGN_OR_RETURN(const auto keys, store_.List(key + "/"));
  for (const std::string& each : keys) GW_RETURN_IF_ERROR(store_.Delete(each));
  return absl::OkStatus();
}

absl::Status RemoteCheckpoints::Sweep(const std::string& key) {
  const size_t begin = key.size() + 1;
  GW_RETURN_IF_ERROR(
      store_.AbortUploads(key + "/", [&](const std::string& upload) {
        return IsLeft(upload.substr(begin, upload.find('/', begin) - begin));
      }));
  GW_ASSIGN_OR_RETURN(const auto folders, store_.ListSegments(key + "/"));
  for (const std::string& folder : folders) {
    if (!IsLeft(folder)) continue;
    GW_ASSIGN_OR_RETURN(const auto commit, Find(key));
    if (commit.has_value() && commit->folder == folder) continue;
    GW_ASSIGN_OR_RETURN(const auto keys, store_.List(key + "/" + folder + "/"));
    for (const std::string& each : keys) {
      GW_RETURN_IF_ERROR(store_.Delete(each));
    }
  }
  return absl::OkStatus();
}

}  // namespace gradwire
