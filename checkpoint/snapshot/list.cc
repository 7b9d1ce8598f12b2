// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/snapshot/list.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/publish.h"
#include "checkpoint/sealed_text.h"

namespace gradwire {
namespace {

constexpr std::string_view kRemovedEnd = "~removed";

std::string RemovedPath(const std::string& directory, const std::string& name) {
  return directory + "/." + name + std::string(kRemovedEnd);
}

// "name" of a hidden name of RemovedPath, "" of others.
std::string RemovedName(const std::string& hidden) {
  if (!hidden.starts_with('.') || !hidden.ends_with(kRemovedEnd)) return "";
  return hidden.substr(1, hidden.size() - 1 - kRemovedEnd.size());
}

// A delta to `parent`, or one that is being made; "" if there is none.
absl::StatusOr<std::string> ChildOf(FileSystem& files,
                                    const std::string& directory,
                                    const std::string& parent) {
  GW_ASSIGN_OR_RETURN(const auto names, files.List(directory));
  for (const std::string& name : names) {
    std::string intended;
    const std::string pending = PendingName(name, &intended);
    if (!pending.empty() && intended == parent) return pending;
  }
  // After the pending ones: each of these was one before it had its name.
  GW_ASSIGN_OR_RETURN(const auto snapshots, ListSnapshots(files, directory));
  for (const ListedSnapshot& other : snapshots) {
    if (other.manifest.ok() && other.manifest->is_delta &&
        other.manifest->parent == parent) {
      return other.name;
    }
  }
  return std::string();
}

}  // namespace

absl::Status SnapshotHasChildren(const std::string& name,
                                 const std::string& child) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "SNAPSHOT_HAS_CHILDREN")
      .With("field", "name")
      .With("value", name)
      .With("child", child)
      .Message("snapshot " + name + " is the parent of the delta " + child +
               "; delete that first");
}

absl::StatusOr<std::vector<ListedSnapshot>> ListSnapshots(
    FileSystem& files, const std::string& directory) {
  auto names = files.List(directory);
  std::vector<ListedSnapshot> listed;
  if (absl::IsNotFound(names.status())) return listed;
  GW_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    if (name.starts_with('.')) continue;
    auto manifest = ReadSnapshot(files, directory, name);
    // A file, or a snapshot that was deleted meanwhile.
    if (absl::IsNotFound(manifest.status())) continue;
    const auto detail = GetErrorDetail(manifest.status());
    const bool damage = absl::IsDataLoss(manifest.status()) ||
                        (detail && detail->reason == "STATE_VERSION");
    if (!manifest.ok() && !damage) return manifest.status();
    listed.push_back({name, std::move(manifest)});
  }
  return listed;
}

absl::Status RemoveSnapshot(FileSystem& files, const std::string& directory,
                            const std::string& name) {
  const std::string path = directory + "/" + name;
  const std::string hidden = RemovedPath(directory, name);
  const auto info = files.Stat(path);
  if (info.ok() && info->is_directory) {
    GW_ASSIGN_OR_RETURN(std::string child, ChildOf(files, directory, name));
    if (!child.empty()) return SnapshotHasChildren(name, child);
    GW_RETURN_IF_ERROR(RemoveIfThere(files, hidden));
    GW_RETURN_IF_ERROR(files.Rename(path, hidden));
    // A save may have begun since. If it has not seen that the parent is gone,
    // its directory was here before, and is found now.
    GW_ASSIGN_OR_RETURN(child, ChildOf(files, directory, name));
    if (!child.empty()) {
      GW_RETURN_IF_ERROR(files.Rename(hidden, path));
      GW_RETURN_IF_ERROR(files.SyncDirectory(directory));
      return SnapshotHasChildren(name, child);
    }
  } else if (!info.ok() && !absl::IsNotFound(info.status())) {
    return info.status();
  } else if (!files.Stat(hidden).ok()) {
    return CheckpointNotFound();
  }
  // Nothing of it goes before its name has.
  GW_RETURN_IF_ERROR(files.SyncDirectory(directory));
  return RemoveIfThere(files, hidden);
}

absl::StatusOr<std::vector<std::string>> RemoveExpired(
    FileSystem& files, const std::string& directory, int64_t now_micros,
    const std::function<int64_t(const SnapshotManifest&)>& expires_micros) {
  GW_ASSIGN_OR_RETURN(const auto snapshots, ListSnapshots(files, directory));
  std::vector<const SnapshotManifest*> expired;
  for (const ListedSnapshot& snapshot : snapshots) {
    if (!snapshot.manifest.ok()) continue;
    const int64_t expires = expires_micros != nullptr
                                ? expires_micros(*snapshot.manifest)
                                : snapshot.manifest->expires_micros;
    if (expires != 0 && expires <= now_micros) {
      expired.push_back(&*snapshot.manifest);
    }
  }
  // A child is younger than its parent.
  std::sort(expired.begin(), expired.end(), [](const auto* a, const auto* b) {
    return a->created_micros > b->created_micros;
  });
  std::vector<std::string> removed;
  for (const SnapshotManifest* each : expired) {
    const absl::Status status = RemoveSnapshot(files, directory, each->name);
    const auto detail = GetErrorDetail(status);
    if (detail && detail->reason == "SNAPSHOT_HAS_CHILDREN") continue;
    GW_RETURN_IF_ERROR(status);
    removed.push_back(each->name);
  }
  return removed;
}

absl::Status RecoverSnapshots(FileSystem& files, const std::string& directory) {
  auto names = files.List(directory);
  if (absl::IsNotFound(names.status())) return absl::OkStatus();
  GW_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    if (!PendingName(name).empty()) {
      GW_RETURN_IF_ERROR(RemoveIfThere(files, directory + "/" + name));
    }
  }
  for (const std::string& name : *names) {
    const std::string removed = RemovedName(name);
    if (removed.empty()) continue;
    const std::string hidden = directory + "/" + name;
    GW_ASSIGN_OR_RETURN(const std::string child,
                        ChildOf(files, directory, removed));
    const auto info = files.Stat(directory + "/" + removed);
    if (!child.empty() && absl::IsNotFound(info.status())) {
      GW_RETURN_IF_ERROR(files.Rename(hidden, directory + "/" + removed));
    } else {
      GW_RETURN_IF_ERROR(RemoveIfThere(files, hidden));
    }
  }
  // A process may have died between a renaming and its sync: then everybody
  // sees what the next power loss takes away.
  return files.SyncDirectory(directory);
}

}  // namespace gradwire
