// SPDX-License-Identifier: Apache-2.0
#include <string>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/state_format.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

// One that is replaced more often while it is linked.
constexpr int kMostReplacements = 16;

enum class Linked { kAll, kCannot, kReplaced };

// "" if there is none.
absl::StatusOr<std::string> ManifestOf(FileSystem& files,
                                       const std::string& directory) {
  auto text = ReadStateFile(files, directory, kManifestName, kMaxManifestBytes);
  if (absl::IsNotFound(text.status())) return std::string();
  return text;
}

// Whatever is there, whole or damaged.
absl::StatusOr<Linked> LinkFiles(FileSystem& files,
                                 const std::string& directory,
                                 const std::string& to) {
  const auto names = files.List(directory);
  if (absl::IsNotFound(names.status())) return CheckpointNotFound();
  GW_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    const auto linked = files.Link(directory + "/" + name, to + "/" + name);
    if (absl::IsNotFound(linked.status())) return Linked::kReplaced;
    GW_RETURN_IF_ERROR(linked.status());
    if (!*linked) return Linked::kCannot;
  }
  // No two checkpoints have the same manifest, unless they are the same.
  GW_ASSIGN_OR_RETURN(const std::string there, ManifestOf(files, directory));
  GW_ASSIGN_OR_RETURN(const std::string here, ManifestOf(files, to));
  return there == here ? Linked::kAll : Linked::kReplaced;
}

}  // namespace

absl::StatusOr<bool> LinkState(FileSystem& files, const std::string& directory,
                               const std::string& to) {
  const std::string parent = DirectoryOf(to);
  const auto linked_before = files.Stat(to);
  if (linked_before.ok()) {
    // By a process that may have died before its sync.
    GW_RETURN_IF_ERROR(files.SyncDirectory(parent));
    return true;
  }
  if (!absl::IsNotFound(linked_before.status())) return linked_before.status();
  const auto there = files.Stat(directory);
  if (absl::IsNotFound(there.status())) return CheckpointNotFound();
  GW_RETURN_IF_ERROR(there.status());
  GW_RETURN_IF_ERROR(MakeDirectories(files, parent));
  const std::string pending = PendingPath(to);
  absl::StatusOr<Linked> linked = Linked::kReplaced;
  for (int i = 0; i < kMostReplacements && linked.ok(); ++i) {
    GW_RETURN_IF_ERROR(RemoveIfThere(files, pending));
    GW_RETURN_IF_ERROR(files.MakeDirectory(pending));
    linked = LinkFiles(files, directory, pending);
    if (linked.ok() && *linked != Linked::kReplaced) break;
  }
  absl::Status status = linked.status();
  if (status.ok() && *linked == Linked::kReplaced) {
    status = ErrorBuilder(absl::StatusCode::kAborted, "CHECKPOINT_REPLACED")
                 .With("checkpoint", LastSegment(directory))
                 .Message(
                     "other checkpoints take the place of this one again and "
                     "again; try later");
  }
  if (status.ok() && *linked == Linked::kAll) {
    status = files.SyncDirectory(pending);
    if (status.ok()) status = files.Rename(pending, to);
    if (status.ok()) {
      GW_RETURN_IF_ERROR(files.SyncDirectory(parent));
      return true;
    }
  }
  // What stays, the next one removes.
  (void)RemoveIfThere(files, pending);
  GW_RETURN_IF_ERROR(status);
  return false;
}

}  // namespace gradwire
