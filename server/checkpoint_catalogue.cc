// SPDX-License-Identifier: Apache-2.0
#include "server/checkpoint_catalogue.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/status.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/training_state.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

constexpr const char* kVectors[] = {"weight", "m", "v"};
constexpr int kMostReplacements = 16;
constexpr std::string_view kUserPrefix = kUserAttribute;

// What can be read of a directory; none is as good as empty.
absl::StatusOr<std::vector<std::string>> NamesIn(const std::string& directory) {
  auto names = PosixFileSystem().List(directory);
  if (absl::IsNotFound(names.status())) return std::vector<std::string>();
  return names;
}

void SetTime(int64_t micros, google::protobuf::Timestamp& time) {
  time.set_seconds(micros / 1'000'000);
  time.set_nanos(static_cast<int32_t>(micros % 1'000'000 * 1000));
}

int64_t MicrosOf(const google::protobuf::Timestamp& time) {
  return time.seconds() * 1'000'000 + time.nanos() / 1000;
}

// When the manifest was written, which is last.
void FillTime(v1::Checkpoint& row) {
  struct stat info;
  const std::string manifest = row.local_path() + "/manifest.json";
  if (stat(manifest.c_str(), &info) != 0 &&
      stat(row.local_path().c_str(), &info) != 0) {
    return;
  }
  SetTime(
      int64_t{info.st_mtim.tv_sec} * 1'000'000 + info.st_mtim.tv_nsec / 1000,
      *row.mutable_create_time());
}

// When a training's checkpoint expires, in microseconds since 1970; 0: never.
int64_t ExpiryOf(const StateHeader& header, const v1::Checkpoint& row) {
  const auto ttl = header.attributes.find(kTtlAttribute);
  if (ttl == header.attributes.end()) return 0;
  return MicrosOf(row.create_time()) +
         static_cast<int64_t>(std::atof(ttl->second.c_str()) * 1e6);
}

// Of a training's checkpoint, wherever it lies. One that is damaged stays for
// somebody to look at.
bool HasExpired(const std::string& directory, int64_t now_micros) {
  const auto header = ReadStateHeader(PosixFileSystem(), directory);
  if (!header.ok()) return false;
  v1::Checkpoint row;
  row.set_local_path(directory);
  FillTime(row);
  const int64_t expiry = ExpiryOf(*header, row);
  return expiry != 0 && expiry <= now_micros;
}

void Fill(const StateReader& reader, v1::Checkpoint& row) {
  const StateHeader& header = reader.header();
  row.set_kind("training");
  row.set_resumable(true);
  row.set_bytes(reader.summary().bytes);
  row.set_digest(reader.summary().digest);
  row.set_optimizer_step(header.optimizer_step);
  row.set_weight_version(header.weight_version);
  row.set_has_optimizer(reader.dtype("m").has_value());
  row.set_num_parameters(header.num_parameters);
  row.set_world_size(reader.world());
  for (const auto& [name, value] : header.attributes) {
    if (name.starts_with(kUserPrefix)) {
      (*row.mutable_user_metadata())[name.substr(kUserPrefix.size())] = value;
    } else {
      (*row.mutable_attributes())[name] = value;
    }
  }
  const int64_t expiry = ExpiryOf(header, row);
  if (expiry != 0) SetTime(expiry, *row.mutable_expire_time());
}

void Fill(const SnapshotManifest& manifest, v1::Checkpoint& row) {
  row.set_kind(manifest.kind());
  row.set_servable(true);
  row.set_promotable(true);
  SetTime(manifest.created_micros, *row.mutable_create_time());
  if (manifest.expires_micros != 0) {
    SetTime(manifest.expires_micros, *row.mutable_expire_time());
  }
  row.set_bytes(manifest.bytes());
  row.set_digest(manifest.digest);
  row.set_optimizer_step(manifest.optimizer_step);
  row.set_weight_version(manifest.weight_version);
  (*row.mutable_attributes())["base_model"] = manifest.base_model;
  row.set_weight_id(manifest.weight_id);
  row.set_parent(manifest.parent);
  row.set_parent_id(manifest.parent_id);
  row.set_chain_length(manifest.chain_length);
  row.set_dtype(manifest.dtype);
  row.set_operation(manifest.operation);
  for (const SnapshotFile& file : manifest.files) {
    v1::CheckpointFile& out = *row.add_files();
    out.set_name(file.name);
    out.set_bytes(file.bytes);
    out.set_digest(file.digest);
  }
}

auto AgeOf(const v1::Checkpoint& row) {
  return std::make_tuple(row.create_time().seconds(), row.create_time().nanos(),
                         row.path());
}

// The first child of each parent.
std::map<std::string, std::string> ChildrenIn(
    const std::vector<ListedSnapshot>& snapshots) {
  std::map<std::string, std::string> children;
  for (const ListedSnapshot& each : snapshots) {
    if (!each.manifest.ok() || !each.manifest->is_delta) continue;
    children.emplace(each.manifest->parent, each.name);
  }
  return children;
}

}  // namespace

std::mutex& CheckpointCatalogue::Removals() {
  // A state directory belongs to one process.
  static std::mutex mutex;
  return mutex;
}

std::string CheckpointCatalogue::DirectoryOf(const CheckpointRef& ref) const {
  return jobs_directory_ + "/" + ref.job_id + "/" + ref.folder() + "/" +
         ref.name;
}

std::string CheckpointCatalogue::SnapshotsOf(const std::string& job) const {
  return jobs_directory_ + "/" + job + "/snapshots";
}

bool CheckpointCatalogue::KnowsJob(const std::string& job_id) const {
  return PosixFileSystem().Stat(jobs_directory_ + "/" + job_id).ok();
}

v1::Checkpoint CheckpointCatalogue::Row(const CheckpointRef& ref) const {
  v1::Checkpoint row;
  row.set_path("gradwire://" + ref.path());
  row.set_job_id(ref.job_id);
  row.set_name(ref.name);
  row.set_local_path(DirectoryOf(ref));
  FillTime(row);
  return row;
}

absl::Status CheckpointCatalogue::ListStatesOf(
    const std::string& job, std::vector<v1::Checkpoint>& rows) const {
  GW_ASSIGN_OR_RETURN(const std::vector<std::string> names,
                      NamesIn(jobs_directory_ + "/" + job + "/checkpoints"));
  for (const std::string& name : names) {
    const CheckpointRef ref = {job, name};
    if (!CheckName(name, "name").ok()) continue;  // not ours, or not yet one
    auto row = Get(ref);
    if (absl::IsNotFound(row.status())) continue;  // deleted meanwhile
    if (!row.ok()) {
      const absl::Status why = row.status();
      row = Row(ref);
      row->set_kind("training");
      *row->mutable_error() = ToOperationError(why);
    }
    rows.push_back(*std::move(row));
  }
  return absl::OkStatus();
}

absl::Status CheckpointCatalogue::ListSnapshotsOf(
    const std::string& job, std::vector<v1::Checkpoint>& rows) const {
  GW_ASSIGN_OR_RETURN(const std::vector<ListedSnapshot> snapshots,
                      ListSnapshots(PosixFileSystem(), SnapshotsOf(job)));
  const std::map<std::string, std::string> children = ChildrenIn(snapshots);
  for (const ListedSnapshot& each : snapshots) {
    if (!CheckName(each.name, "name").ok()) continue;
    v1::Checkpoint row = Row({job, each.name, true});
    if (each.manifest.ok()) {
      Fill(*each.manifest, row);
    } else {
      *row.mutable_error() = ToOperationError(each.manifest.status());
    }
    const auto child = children.find(each.name);
    if (child != children.end()) row.set_child(child->second);
    rows.push_back(std::move(row));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<v1::Checkpoint>> CheckpointCatalogue::List(
    const std::string& job_id) const {
  std::vector<std::string> jobs = {job_id};
  if (job_id.empty()) {
    GW_ASSIGN_OR_RETURN(jobs, NamesIn(jobs_directory_));
  }
  std::vector<v1::Checkpoint> rows;
  for (const std::string& job : jobs) {
    GW_RETURN_IF_ERROR(ListStatesOf(job, rows));
    GW_RETURN_IF_ERROR(ListSnapshotsOf(job, rows));
  }
  std::sort(rows.begin(), rows.end(),
            [](const auto& a, const auto& b) { return AgeOf(a) < AgeOf(b); });
  return rows;
}

absl::StatusOr<std::vector<CheckpointRef>> CheckpointCatalogue::Refs() const {
  GW_ASSIGN_OR_RETURN(const auto jobs, NamesIn(jobs_directory_));
  std::vector<CheckpointRef> refs;
  for (const std::string& job : jobs) {
    for (const bool snapshot : {false, true}) {
      CheckpointRef ref = {job, "", snapshot};
      GW_ASSIGN_OR_RETURN(const auto names, NamesIn(jobs_directory_ + "/" +
                                                    job + "/" + ref.folder()));
      for (const std::string& name : names) {
        if (!CheckName(name, "name").ok()) continue;  // not yet one
        ref.name = name;
        refs.push_back(ref);
      }
    }
  }
  return refs;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::GetSnapshot(
    const CheckpointRef& ref) const {
  const std::string directory = SnapshotsOf(ref.job_id);
  GW_ASSIGN_OR_RETURN(const SnapshotManifest manifest,
                      ReadSnapshot(PosixFileSystem(), directory, ref.name));
  GW_ASSIGN_OR_RETURN(const std::vector<ListedSnapshot> snapshots,
                      ListSnapshots(PosixFileSystem(), directory));
  const std::map<std::string, std::string> children = ChildrenIn(snapshots);
  v1::Checkpoint row = Row(ref);
  Fill(manifest, row);
  const auto child = children.find(ref.name);
  if (child != children.end()) row.set_child(child->second);
  return row;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::Get(
    const CheckpointRef& ref) const {
  if (ref.snapshot) return GetSnapshot(ref);
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<StateReader> reader,
                      StateReader::Open(PosixFileSystem(), DirectoryOf(ref)));
  v1::Checkpoint row = Row(ref);
  Fill(*reader, row);
  return row;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::Verify(
    const CheckpointRef& ref) const {
  if (ref.snapshot) {
    GW_RETURN_IF_ERROR(VerifySnapshot(ref));
    return GetSnapshot(ref);
  }
  auto row = VerifyState(ref);
  // By a save with `overwrite`: then it is that one which counts.
  for (int i = 0; i < kMostReplacements && absl::IsAborted(row.status()); ++i) {
    row = VerifyState(ref);
  }
  return row;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::VerifyState(
    const CheckpointRef& ref) const {
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<StateReader> reader,
                      StateReader::Open(PosixFileSystem(), DirectoryOf(ref)));
  for (const char* vector : kVectors) {
    if (!reader->dtype(vector)) continue;
    GW_RETURN_IF_ERROR(
        reader->Verify(vector, 0, reader->header().num_parameters));
  }
  v1::Checkpoint row = Row(ref);
  Fill(*reader, row);
  return row;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::Delete(
    const CheckpointRef& ref) const {
  const std::lock_guard<std::mutex> lock(Removals());
  v1::Checkpoint row = Row(ref);
  row.set_kind("training");
  if (ref.snapshot) {
    if (auto known = GetSnapshot(ref); known.ok()) row = *std::move(known);
    GW_RETURN_IF_ERROR(
        RemoveSnapshot(PosixFileSystem(), SnapshotsOf(ref.job_id), ref.name));
    return row;
  }
  GW_RETURN_IF_ERROR(RemoveState(PosixFileSystem(), DirectoryOf(ref)));
  return row;
}

absl::Status CheckpointCatalogue::DeleteExpired(
    absl::Time now, std::vector<std::string>& paths) const {
  const std::lock_guard<std::mutex> lock(Removals());
  const int64_t now_micros = absl::ToUnixMicros(now);
  GW_ASSIGN_OR_RETURN(const auto jobs, NamesIn(jobs_directory_));
  absl::Status first;
  for (const std::string& job : jobs) {
    const auto states = NamesIn(jobs_directory_ + "/" + job + "/checkpoints");
    first.Update(states.status());
    for (const std::string& name :
         states.ok() ? *states : std::vector<std::string>()) {
      if (!CheckName(name, "name").ok()) continue;  // not yet one
      const v1::Checkpoint row = Row({job, name});
      const auto expired = [&](const std::string& directory) {
        return HasExpired(directory, now_micros);
      };
      if (!expired(row.local_path())) continue;
      const absl::StatusOr<bool> removed =
          RemoveStateIf(PosixFileSystem(), row.local_path(), expired);
      if (removed.ok() && *removed) paths.push_back(row.path());
      if (!absl::IsNotFound(removed.status())) first.Update(removed.status());
    }
    const auto names =
        RemoveExpired(PosixFileSystem(), SnapshotsOf(job), now_micros);
    first.Update(names.status());
    if (!names.ok()) continue;
    for (const std::string& name : *names) {
      paths.push_back("gradwire://" + CheckpointRef{job, name, true}.path());
    }
  }
  return first;
}

}  // namespace gradwire
