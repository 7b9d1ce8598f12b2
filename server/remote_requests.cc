// SPDX-License-Identifier: Apache-2.0
// What requests ask of the object store.
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/list.h"
#include "server/grpc_status.h"
#include "server/remote_store.h"

namespace gradwire {
namespace {

constexpr const char* kFolders[] = {"checkpoints", "snapshots"};

v1::Checkpoint RowOf(const CheckpointRef& ref, const RemoteCommit& commit,
                     const std::string& url) {
  v1::Checkpoint row;
  row.set_path("gradwire://" + ref.path());
  row.set_job_id(ref.job_id);
  row.set_name(ref.name);
  row.set_kind(!ref.snapshot           ? "training"
               : commit.parent.empty() ? "base"
                                       : "delta");
  row.set_parent(commit.parent);
  row.set_bytes(commit.bytes());
  row.set_digest(commit.digest);
  row.set_object_url(url + "/" + ref.path());
  row.mutable_create_time()->set_seconds(commit.created_micros / 1'000'000);
  row.mutable_create_time()->set_nanos(
      static_cast<int32_t>(commit.created_micros % 1'000'000 * 1000));
  return row;
}

}  // namespace

absl::StatusOr<v1::Checkpoint> RemoteStore::Get(const CheckpointRef& ref) {
  GW_ASSIGN_OR_RETURN(const auto commit, remote_.Find(ref.path()));
  if (!commit.has_value()) return RemoteCheckpoints::Missing(ref.path());
  return RowOf(ref, *commit, url());
}

v1::Checkpoint RemoteStore::Name(const CheckpointRef& ref) const {
  return RowOf(ref, {}, url());
}

absl::StatusOr<std::vector<v1::Checkpoint>> RemoteStore::List(
    const std::string& job_id) {
  std::vector<std::string> jobs = {job_id};
  if (job_id.empty()) {
    GW_ASSIGN_OR_RETURN(jobs, store_->ListSegments("jobs/"));
  }
  std::vector<v1::Checkpoint> rows;
  for (const std::string& job : jobs) {
    for (const char* folder : kFolders) {
      GW_ASSIGN_OR_RETURN(const auto names,
                          remote_.ListNames("jobs/" + job + "/" + folder));
      for (const std::string& name : names) {
        if (!CheckName(name, "name").ok()) continue;
        const CheckpointRef ref = {job, name, folder == kFolders[1]};
        auto row = Get(ref);
        if (absl::IsNotFound(row.status())) continue;  // deleted meanwhile
        if (absl::IsUnavailable(row.status())) return row.status();
        if (!row.ok()) {
          const absl::Status why = row.status();
          row = Name(ref);
          *row->mutable_error() = ToOperationError(why);
        }
        rows.push_back(*std::move(row));
      }
    }
  }
  return rows;
}

absl::Status RemoteStore::FetchOne(const CheckpointRef& ref) {
  const std::string directory = catalogue_.DirectoryOf(ref);
  const auto there = files_.Stat(directory);
  if (!absl::IsNotFound(there.status())) {
    GW_RETURN_IF_ERROR(there.status());
    const auto row = catalogue_.Get(ref);
    if (!row.ok() || row->parent().empty()) return absl::OkStatus();
    return FetchOne({ref.job_id, row->parent(), true});
  }
  GW_ASSIGN_OR_RETURN(const auto commit, remote_.Find(ref.path()));
  if (!commit.has_value()) return RemoteCheckpoints::Missing(ref.path());
  // What a delta applies to comes first.
  if (!commit->parent.empty()) {
    GW_RETURN_IF_ERROR(CheckName(commit->parent, "parent"));
    GW_RETURN_IF_ERROR(FetchOne({ref.job_id, commit->parent, true}));
  }
  GW_RETURN_IF_ERROR(MakeDirectories(files_, gradwire::DirectoryOf(directory)));
  // Before anybody sees it, who would take it for a new one.
  GW_RETURN_IF_ERROR(catalogue_.WillFetch(ref, commit->digest,
                                          RowOf(ref, *commit, url()).kind(),
                                          commit->created_micros));
  GW_RETURN_IF_ERROR(remote_.Fetch(ref.path(), directory).status());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Unless a save has taken the name since.
    if (saved_.count(ref.path()) == 0) stored_[ref.path()] = commit->digest;
  }
  spdlog::info("{} was fetched from {}", ref.path(), url());
  if (commit->parent.empty()) return absl::OkStatus();
  // It may have expired again before anything on the disk needed it.
  return FetchOne({ref.job_id, commit->parent, true});
}

absl::Status RemoteStore::Fetch(const CheckpointRef& ref) {
  // What is there needs neither the store nor to wait for it. (A snapshot may
  // need a parent that is not there.)
  if (!ref.snapshot && files_.Stat(catalogue_.DirectoryOf(ref)).ok()) {
    return absl::OkStatus();
  }
  const std::lock_guard<std::mutex> lock(fetching_);
  return FetchOne(ref);
}

absl::StatusOr<v1::Checkpoint> RemoteStore::Delete(const CheckpointRef& ref) {
  const std::lock_guard<std::mutex> lock(fetching_);
  // First, for a delta may be in the store alone.
  GW_RETURN_IF_ERROR(CheckNoChild(ref));
  auto row = catalogue_.Delete(ref);
  if (absl::IsNotFound(row.status())) {
    auto there = Get(ref);
    if (absl::IsNotFound(there.status())) return row;
    // One that is damaged goes as well.
    if (absl::IsDataLoss(there.status())) there = Name(ref);
    row = std::move(there);
  }
  GW_RETURN_IF_ERROR(row.status());
  GW_RETURN_IF_ERROR(RemoveCopy({ref, row->digest()}));
  return row;
}

absl::Status RemoteStore::RemoveCopy(const Removal& removal) {
  const CheckpointRef& ref = removal.ref;
  const auto is_no_longer_stored = [&] {
    const std::lock_guard<std::mutex> lock(mutex_);
    stored_.erase(ref.path());
    failures_.erase(ref.path());
  };
  // What is interrupted, the next server ends; one that has lost its lease does
  // not begin.
  GW_RETURN_IF_ERROR(WillRemove(ref, removal.digest));
  is_no_longer_stored();
  bool begins = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    begins = storing_ != ref.path();
    if (begins) removing_ = ref.path();
  }
  if (!begins) {
    // When that has ended, which may take long.
    RemoveLater(ref, removal.digest);
    return absl::OkStatus();
  }
  const absl::Status removed = remote_.Remove(ref.path());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    removing_.clear();
  }
  Wake();
  GW_RETURN_IF_ERROR(removed);
  // What was stored or fetched meanwhile is stored once more.
  is_no_longer_stored();
  GW_RETURN_IF_ERROR(metadata_->EndRemoval({ref.path(), removal.digest}));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    may_have_no_child_ = true;
  }
  Wake();
  return absl::OkStatus();
}

absl::Status RemoteStore::CheckNoChild(const CheckpointRef& ref) {
  if (!ref.snapshot) return absl::OkStatus();
  const std::string folder = "jobs/" + ref.job_id + "/" + kFolders[1];
  GW_ASSIGN_OR_RETURN(const auto names, remote_.ListNames(folder));
  for (const std::string& name : names) {
    const auto commit = remote_.Find(folder + "/" + name);
    // One that is damaged says of no parent.
    if (absl::IsUnavailable(commit.status())) return commit.status();
    if (commit.ok() && commit->has_value() && (*commit)->parent == ref.name) {
      return SnapshotHasChildren(ref.name, name);
    }
  }
  return absl::OkStatus();
}

absl::Status RemoteStore::WillRemove(const CheckpointRef& ref,
                                     const std::string& digest) {
  return metadata_->AddRemoval({ref.path(), digest});
}

void RemoteStore::RemoveLater(const CheckpointRef& ref,
                              const std::string& digest) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Add({ref, digest});
  }
  Wake();
}

}  // namespace gradwire
