// SPDX-License-Identifier: Apache-2.0
#include <functional>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/state_format.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

constexpr std::string_view kPendingEnd = ".pending";
// No checkpoint's name has a '~' (server/names.h).
constexpr std::string_view kAsideEnd = "~replaced.pending";
constexpr std::string_view kDeletedEnd = "~deleted.pending";

absl::Status Exists(const std::string& directory) {
  const std::string name = LastSegment(directory);
  return ErrorBuilder(absl::StatusCode::kAlreadyExists, "CHECKPOINT_EXISTS")
      .With("field", "name")
      .With("value", name)
      .Message("there is already a checkpoint " + name +
               "; choose another name, or say that it shall be replaced");
}

// "/a/.b" + end of "/a/b".
std::string HiddenPath(const std::string& directory, std::string_view end) {
  const std::string name = LastSegment(directory);
  return directory.substr(0, directory.size() - name.size()) + "." + name +
         std::string(end);
}

// After a replacement in two steps that was interrupted: between them, the
// earlier checkpoint is put back.
absl::Status PutBack(FileSystem& files, const std::string& directory) {
  const std::string aside = HiddenPath(directory, kAsideEnd);
  const auto left = files.Stat(aside);
  if (absl::IsNotFound(left.status())) return absl::OkStatus();
  GW_RETURN_IF_ERROR(left.status());
  const auto there = files.Stat(directory);
  if (absl::IsNotFound(there.status())) {
    GW_RETURN_IF_ERROR(files.Rename(aside, directory));
    return files.SyncDirectory(DirectoryOf(directory));
  }
  GW_RETURN_IF_ERROR(there.status());
  // Before the one that a power loss might bring back loses its files.
  GW_RETURN_IF_ERROR(files.SyncDirectory(DirectoryOf(directory)));
  return RemoveIfThere(files, aside);
}

absl::Status CheckAbsent(FileSystem& files, const std::string& path) {
  const auto info = files.Stat(path);
  if (info.ok()) return Exists(path);
  if (absl::IsNotFound(info.status())) return absl::OkStatus();
  return info.status();
}

// That all ranks have finished, and nobody else was here.
absl::Status CheckNames(FileSystem& files, const std::string& pending,
                        int world) {
  GW_ASSIGN_OR_RETURN(const auto names, files.List(pending));
  std::set<std::string> others(names.begin(), names.end());
  for (int rank = 0; rank < world; ++rank) {
    // A table is the last thing that a rank writes.
    if (others.erase(TableName(rank)) + others.erase(DataName(rank)) != 2) {
      return PiecesInvalid("rank", rank,
                           "has not finished; publish when all have");
    }
  }
  if (others.empty()) return absl::OkStatus();
  return PiecesInvalid(others.begin()->substr(0, 40), world,
                       "is not a file of one of so many ranks; ranks are "
                       "numbered from 0");
}

}  // namespace

std::string PendingPath(const std::string& directory) {
  return HiddenPath(directory, kPendingEnd);
}

absl::StatusOr<PendingState> PendingState::Create(FileSystem& files,
                                                  const std::string& directory,
                                                  bool replaces) {
  const std::string name = LastSegment(directory);
  // Hidden names belong to checkpoints that do not exist yet.
  if (name.empty() || name.starts_with('.')) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "INVALID_NAME")
        .With("field", "name")
        .With("value", name)
        .With("grammar", "[^./][^/]*")
        .Message("a checkpoint cannot be named \"" + name +
                 "\"; give a name that does not begin with a dot");
  }
  GW_RETURN_IF_ERROR(PutBack(files, directory));
  if (!replaces) GW_RETURN_IF_ERROR(CheckAbsent(files, directory));
  const std::string pending = PendingPath(directory);
  const auto left = files.Stat(pending);
  if (left.ok()) {
    // It may be one that was replaced, and that a power loss would bring back.
    GW_RETURN_IF_ERROR(files.SyncDirectory(DirectoryOf(directory)));
    GW_RETURN_IF_ERROR(RemoveIfThere(files, pending));
  } else if (!absl::IsNotFound(left.status())) {
    return left.status();
  }
  GW_RETURN_IF_ERROR(files.MakeDirectory(pending));
  return PendingState(files, directory, replaces);
}

PendingState::PendingState(FileSystem& files, std::string directory,
                           bool replaces)
    : files_(&files),
      directory_(std::move(directory)),
      replaces_(replaces),
      pending_(PendingPath(directory_)) {}

PendingState::PendingState(PendingState&& other) noexcept
    : files_(other.files_),
      directory_(std::move(other.directory_)),
      replaces_(other.replaces_),
      pending_(std::move(other.pending_)) {
  other.pending_.clear();
}

PendingState::~PendingState() {
  // What cannot be removed now is a leftover, and removed by the next.
  if (!pending_.empty()) (void)RemoveDirectory(*files_, pending_);
}

absl::StatusOr<StateSummary> PendingState::Publish(const StateHeader& header,
                                                   int world) {
  GW_RETURN_IF_ERROR(CheckHeader(header));
  if (world < 1 || world > kMaxRanks) {
    return PiecesInvalid("world", world, "is not from 1 to 100000");
  }
  GW_RETURN_IF_ERROR(CheckNames(*files_, pending_, world));
  StateManifest manifest{.header = header, .ranks = {}, .digest = ""};
  std::vector<StateTable> tables;
  StateSummary summary;
  for (int rank = 0; rank < world; ++rank) {
    GW_ASSIGN_OR_RETURN(
        const std::string text,
        ReadStateFile(*files_, pending_, TableName(rank), kMaxTableBytes));
    GW_ASSIGN_OR_RETURN(const auto data,
                        files_->Stat(pending_ + "/" + DataName(rank)));
    GW_ASSIGN_OR_RETURN(StateTable table, ParseTable(text, rank, data.bytes));
    tables.push_back(std::move(table));
    manifest.ranks.push_back(
        {.table_bytes = std::ssize(text), .table_digest = DigestOf(text)});
    summary.bytes += std::ssize(text) + data.bytes;
  }
  GW_RETURN_IF_ERROR(IndexPieces(header.num_parameters, tables).status());

  const std::string text = ManifestText(manifest);
  // What could not be read is not published.
  GW_ASSIGN_OR_RETURN(manifest, ParseManifest(text));
  summary.digest = manifest.digest;
  summary.bytes += std::ssize(text);
  {
    GW_ASSIGN_OR_RETURN(const std::unique_ptr<File> file,
                        files_->Create(pending_ + "/" + kManifestName));
    GW_RETURN_IF_ERROR(file->WriteAt(0, text));
    GW_RETURN_IF_ERROR(file->Sync());
  }
  GW_RETURN_IF_ERROR(files_->SyncDirectory(pending_));
  absl::Status named = TakeName();
  // It was deleted, or another one came, between a look and a change.
  if (replaces_ && !pending_.empty() &&
      (absl::IsNotFound(named) || absl::IsAlreadyExists(named))) {
    named = TakeName();
  }
  GW_RETURN_IF_ERROR(named);
  return summary;
}

absl::Status PendingState::TakeName() {
  // Renaming would replace an empty directory; one that has files it refuses.
  const absl::Status absent = CheckAbsent(*files_, directory_);
  if (replaces_ && absl::IsAlreadyExists(absent)) return Replace();
  GW_RETURN_IF_ERROR(absent);
  if (const absl::Status renamed = files_->Rename(pending_, directory_);
      !renamed.ok()) {
    return absl::IsAlreadyExists(renamed) ? Exists(directory_) : renamed;
  }
  pending_.clear();
  return files_->SyncDirectory(DirectoryOf(directory_));
}

absl::Status PendingState::Replace() {
  const std::string parent = DirectoryOf(directory_);
  std::string old = pending_;
  GW_ASSIGN_OR_RETURN(const bool exchanged,
                      files_->Exchange(pending_, directory_));
  if (!exchanged) {
    // There is a moment without either.
    old = HiddenPath(directory_, kAsideEnd);
    GW_RETURN_IF_ERROR(files_->Rename(directory_, old));
    const absl::Status moved = files_->Rename(pending_, directory_);
    if (!moved.ok()) {
      // If this fails as well, whoever comes next does it.
      (void)files_->Rename(old, directory_);
      return moved;
    }
  }
  // From here on it has the name, and the one that it replaces is whole until
  // no power loss can bring it back.
  pending_.clear();
  GW_RETURN_IF_ERROR(files_->SyncDirectory(parent));
  // What stays of it is a leftover.
  (void)RemoveIfThere(*files_, old);
  return absl::OkStatus();
}

absl::Status RemoveState(FileSystem& files, const std::string& directory) {
  return RemoveStateIf(files, directory, nullptr).status();
}

absl::StatusOr<bool> RemoveStateIf(
    FileSystem& files, const std::string& directory,
    const std::function<bool(const std::string& directory)>& holds) {
  // First out of sight at once; RemoveLeftovers knows it by its end.
  const std::string hidden = HiddenPath(directory, kDeletedEnd);
  GW_RETURN_IF_ERROR(RemoveIfThere(files, hidden));
  const auto info = files.Stat(directory);
  if (absl::IsNotFound(info.status()) || (info.ok() && !info->is_directory)) {
    return CheckpointNotFound();
  }
  GW_RETURN_IF_ERROR(info.status());
  std::string from = directory;
  if (holds != nullptr) {
    // Where nobody replaces it any more, and a start would put it back.
    from = HiddenPath(directory, kAsideEnd);
    GW_RETURN_IF_ERROR(files.Rename(directory, from));
    if (!holds(from)) {
      GW_RETURN_IF_ERROR(PutBack(files, directory));
      return false;
    }
  }
  GW_RETURN_IF_ERROR(files.Rename(from, hidden));
  GW_RETURN_IF_ERROR(files.SyncDirectory(DirectoryOf(directory)));
  GW_RETURN_IF_ERROR(RemoveIfThere(files, hidden));
  return true;
}

absl::Status RemoveLeftovers(FileSystem& files, const std::string& parent) {
  GW_ASSIGN_OR_RETURN(const auto before, files.List(parent));
  for (const std::string& name : before) {
    if (!name.starts_with('.') || !name.ends_with(kAsideEnd)) continue;
    GW_RETURN_IF_ERROR(PutBack(
        files,
        parent + "/" + name.substr(1, name.size() - 1 - kAsideEnd.size())));
  }
  // A process may have died between a change of names and its sync: then
  // everybody sees the new checkpoint, and the next power loss takes it away,
  // or brings the one back that it has replaced.
  GW_RETURN_IF_ERROR(files.SyncDirectory(parent));
  GW_ASSIGN_OR_RETURN(const auto names, files.List(parent));
  for (const std::string& name : names) {
    if (!name.starts_with('.') || !name.ends_with(kPendingEnd) ||
        name.size() <= kPendingEnd.size() + 1) {
      continue;
    }
    GW_RETURN_IF_ERROR(RemoveIfThere(files, parent + "/" + name));
  }
  return absl::OkStatus();
}

}  // namespace gradwire
