// SPDX-License-Identifier: Apache-2.0
#include "server/checkpoint_catalogue.h"

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
#include "server/catalogue_rows.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

constexpr const char* kVectors[] = {"weight", "m", "v"};
constexpr int kMostReplacements = 16;
constexpr std::string_view kUserPrefix = kUserAttribute;

// For how long a training's checkpoint was to stay when it was saved, in
// microseconds; 0: for ever.
int64_t TtlOf(const StateHeader& header) {
  const auto ttl = header.attributes.find(kTtlAttribute);
  if (ttl == header.attributes.end()) return 0;
  return static_cast<int64_t>(std::atof(ttl->second.c_str()) * 1e6);
}

// What the metadata know of these files counts.
void FillKnownTimes(const std::map<std::string, CheckpointRow>& known,
                    v1::Checkpoint& row) {
  const auto found = known.find(row.path());
  if (found == known.end() || found->second.digest != row.digest()) return;
  SetTime(found->second.created_microseconds, *row.mutable_create_time());
  SetExpiry(found->second.expires_microseconds, row);
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

std::string CheckpointCatalogue::DirectoryOf(const CheckpointRef& ref) const {
  return jobs_directory_ + "/" + ref.job_id + "/" + ref.folder() + "/" +
         ref.name;
}

std::string CheckpointCatalogue::SnapshotsOf(const std::string& job) const {
  return jobs_directory_ + "/" + job + "/snapshots";
}

bool CheckpointCatalogue::KnowsJob(const std::string& job_id) const {
  return files_->Stat(jobs_directory_ + "/" + job_id).ok();
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

absl::StatusOr<CheckpointCatalogue::Known> CheckpointCatalogue::AllKnown()
    const {
  GW_ASSIGN_OR_RETURN(std::vector<CheckpointRow> rows,
                      metadata_->Checkpoints());
  Known known;
  for (CheckpointRow& row : rows) {
    const std::string path = "gradwire://" + row.path;
    known[path] = std::move(row);
  }
  return known;
}

absl::StatusOr<CheckpointCatalogue::Known> CheckpointCatalogue::KnownOf(
    const CheckpointRef& ref) const {
  GW_ASSIGN_OR_RETURN(auto row, metadata_->FindCheckpoint(ref.path()));
  Known known;
  if (row.has_value()) known["gradwire://" + ref.path()] = *std::move(row);
  return known;
}

void CheckpointCatalogue::Fill(const StateHeader& header,
                               const std::string& digest, const Known& known,
                               v1::Checkpoint& row) const {
  row.set_kind("training");
  row.set_resumable(true);
  row.set_digest(digest);
  row.set_optimizer_step(header.optimizer_step);
  row.set_weight_version(header.weight_version);
  row.set_num_parameters(header.num_parameters);
  for (const auto& [name, value] : header.attributes) {
    if (name.starts_with(kUserPrefix)) {
      (*row.mutable_user_metadata())[name.substr(kUserPrefix.size())] = value;
    } else {
      (*row.mutable_attributes())[name] = value;
    }
  }
  if (const int64_t ttl = TtlOf(header); ttl != 0) {
    SetExpiry(MicrosOf(row.create_time()) + ttl, row);
  }
  FillKnownTimes(known, row);
}

void CheckpointCatalogue::Fill(const StateReader& reader, const Known& known,
                               v1::Checkpoint& row) const {
  Fill(reader.header(), reader.summary().digest, known, row);
  row.set_bytes(reader.summary().bytes);
  row.set_has_optimizer(reader.dtype("m").has_value());
  row.set_world_size(reader.world());
}

void CheckpointCatalogue::Fill(const SnapshotManifest& manifest,
                               const Known& known, v1::Checkpoint& row) const {
  row.set_kind(manifest.kind());
  row.set_servable(true);
  row.set_promotable(true);
  SetTime(manifest.created_micros, *row.mutable_create_time());
  SetExpiry(manifest.expires_micros, row);
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
  FillKnownTimes(known, row);
}

absl::Status CheckpointCatalogue::ListStatesOf(
    const std::string& job, const Known& known,
    std::vector<v1::Checkpoint>& rows) const {
  GW_ASSIGN_OR_RETURN(
      const std::vector<std::string> names,
      NamesIn(*files_, jobs_directory_ + "/" + job + "/checkpoints"));
  for (const std::string& name : names) {
    const CheckpointRef ref = {job, name};
    if (!CheckName(name, "name").ok()) continue;  // not ours, or not yet one
    auto row = GetState(ref, known);
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
    const std::string& job, const Known& known,
    std::vector<v1::Checkpoint>& rows) const {
  GW_ASSIGN_OR_RETURN(const std::vector<ListedSnapshot> snapshots,
                      ListSnapshots(*files_, SnapshotsOf(job)));
  const std::map<std::string, std::string> children = ChildrenIn(snapshots);
  for (const ListedSnapshot& each : snapshots) {
    if (!CheckName(each.name, "name").ok()) continue;
    v1::Checkpoint row = Row({job, each.name, true});
    if (each.manifest.ok()) {
      Fill(*each.manifest, known, row);
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
    GW_ASSIGN_OR_RETURN(jobs, NamesIn(*files_, jobs_directory_));
  }
  GW_ASSIGN_OR_RETURN(const Known known, AllKnown());
  std::vector<v1::Checkpoint> rows;
  for (const std::string& job : jobs) {
    GW_RETURN_IF_ERROR(ListStatesOf(job, known, rows));
    GW_RETURN_IF_ERROR(ListSnapshotsOf(job, known, rows));
  }
  std::sort(rows.begin(), rows.end(),
            [](const auto& a, const auto& b) { return AgeOf(a) < AgeOf(b); });
  return rows;
}

absl::StatusOr<std::vector<CheckpointRef>> CheckpointCatalogue::Refs() const {
  GW_ASSIGN_OR_RETURN(const auto jobs, NamesIn(*files_, jobs_directory_));
  std::vector<CheckpointRef> refs;
  for (const std::string& job : jobs) {
    for (const bool snapshot : {false, true}) {
      CheckpointRef ref = {job, "", snapshot};
      GW_ASSIGN_OR_RETURN(
          const auto names,
          NamesIn(*files_, jobs_directory_ + "/" + job + "/" + ref.folder()));
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
  GW_ASSIGN_OR_RETURN(const Known known, KnownOf(ref));
  GW_ASSIGN_OR_RETURN(const SnapshotManifest manifest,
                      ReadSnapshot(*files_, directory, ref.name));
  GW_ASSIGN_OR_RETURN(const std::vector<ListedSnapshot> snapshots,
                      ListSnapshots(*files_, directory));
  const std::map<std::string, std::string> children = ChildrenIn(snapshots);
  v1::Checkpoint row = Row(ref);
  Fill(manifest, known, row);
  const auto child = children.find(ref.name);
  if (child != children.end()) row.set_child(child->second);
  return row;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::GetState(
    const CheckpointRef& ref, const Known& known) const {
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<StateReader> reader,
                      StateReader::Open(*files_, DirectoryOf(ref)));
  v1::Checkpoint row = Row(ref);
  Fill(*reader, known, row);
  return row;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::Get(
    const CheckpointRef& ref) const {
  if (ref.snapshot) return GetSnapshot(ref);
  GW_ASSIGN_OR_RETURN(const Known known, KnownOf(ref));
  return GetState(ref, known);
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
                      StateReader::Open(*files_, DirectoryOf(ref)));
  for (const char* vector : kVectors) {
    if (!reader->dtype(vector)) continue;
    GW_RETURN_IF_ERROR(
        reader->Verify(vector, 0, reader->header().num_parameters));
  }
  GW_ASSIGN_OR_RETURN(const Known known, KnownOf(ref));
  v1::Checkpoint row = Row(ref);
  Fill(*reader, known, row);
  return row;
}

}  // namespace gradwire
