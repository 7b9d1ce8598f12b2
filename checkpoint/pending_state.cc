// SPDX-License-Identifier: Apache-2.0
#include <set>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/state_format.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

constexpr std::string_view kPendingEnd = ".pending";

absl::Status Exists(const std::string& directory) {
  const std::string name = LastSegment(directory);
  return ErrorBuilder(absl::StatusCode::kAlreadyExists, "CHECKPOINT_EXISTS")
      .With("field", "name")
      .With("value", name)
      .Message("there is already a checkpoint " + name +
               "; names are used once, choose another");
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
  const std::string name = LastSegment(directory);
  return directory.substr(0, directory.size() - name.size()) + "." + name +
         std::string(kPendingEnd);
}

absl::StatusOr<PendingState> PendingState::Create(
    FileSystem& files, const std::string& directory) {
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
  GW_RETURN_IF_ERROR(CheckAbsent(files, directory));
  GW_RETURN_IF_ERROR(RemoveIfThere(files, PendingPath(directory)));
  GW_RETURN_IF_ERROR(files.MakeDirectory(PendingPath(directory)));
  return PendingState(files, directory);
}

PendingState::PendingState(FileSystem& files, std::string directory)
    : files_(&files),
      directory_(std::move(directory)),
      pending_(PendingPath(directory_)) {}

PendingState::PendingState(PendingState&& other) noexcept
    : files_(other.files_),
      directory_(std::move(other.directory_)),
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
  // Renaming would replace an empty directory; one that has files it refuses.
  GW_RETURN_IF_ERROR(CheckAbsent(*files_, directory_));
  if (const absl::Status renamed = files_->Rename(pending_, directory_);
      !renamed.ok()) {
    return absl::IsAlreadyExists(renamed) ? Exists(directory_) : renamed;
  }
  pending_.clear();
  GW_RETURN_IF_ERROR(files_->SyncDirectory(DirectoryOf(directory_)));
  return summary;
}

absl::Status RemoveState(FileSystem& files, const std::string& directory) {
  // First out of sight at once; RemoveLeftovers knows it by its end.
  const std::string hidden = DirectoryOf(directory) + "/." +
                             LastSegment(directory) + ".deleted" +
                             std::string(kPendingEnd);
  GW_RETURN_IF_ERROR(RemoveIfThere(files, hidden));
  const auto info = files.Stat(directory);
  if (absl::IsNotFound(info.status()) || (info.ok() && !info->is_directory)) {
    return CheckpointNotFound();
  }
  GW_RETURN_IF_ERROR(info.status());
  GW_RETURN_IF_ERROR(files.Rename(directory, hidden));
  GW_RETURN_IF_ERROR(files.SyncDirectory(DirectoryOf(directory)));
  return RemoveIfThere(files, hidden);
}

absl::Status RemoveLeftovers(FileSystem& files, const std::string& parent) {
  GW_ASSIGN_OR_RETURN(const auto names, files.List(parent));
  for (const std::string& name : names) {
    if (!name.starts_with('.') || !name.ends_with(kPendingEnd) ||
        name.size() <= kPendingEnd.size() + 1) {
      continue;
    }
    GW_RETURN_IF_ERROR(RemoveIfThere(files, parent + "/" + name));
  }
  // A process may have died between a renaming and its sync: then everybody
  // sees the checkpoint, and the next power loss takes it away.
  return files.SyncDirectory(parent);
}

}  // namespace gradwire
