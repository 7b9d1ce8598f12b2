// SPDX-License-Identifier: Apache-2.0
#include "server/checkpoint_catalogue.h"

#include <sys/stat.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/status.h"
#include "checkpoint/file_system.h"
#include "checkpoint/training_state.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

constexpr const char* kVectors[] = {"weight", "m", "v"};

// What can be read of a directory; none is as good as empty.
absl::StatusOr<std::vector<std::string>> NamesIn(const std::string& directory) {
  auto names = PosixFileSystem().List(directory);
  if (absl::IsNotFound(names.status())) return std::vector<std::string>();
  return names;
}

// When the manifest was written, which is last.
void FillTime(v1::Checkpoint& row) {
  struct stat info;
  const std::string manifest = row.local_path() + "/manifest.json";
  if (stat(manifest.c_str(), &info) != 0 &&
      stat(row.local_path().c_str(), &info) != 0) {
    return;
  }
  row.mutable_create_time()->set_seconds(info.st_mtim.tv_sec);
  row.mutable_create_time()->set_nanos(
      static_cast<int32_t>(info.st_mtim.tv_nsec));
}

void Fill(const StateReader& reader, v1::Checkpoint& row) {
  const StateHeader& header = reader.header();
  row.set_bytes(reader.summary().bytes);
  row.set_digest(reader.summary().digest);
  row.set_optimizer_step(header.optimizer_step);
  row.set_weight_version(header.weight_version);
  row.set_has_optimizer(reader.dtype("m").has_value());
  row.set_num_parameters(header.num_parameters);
  row.set_world_size(reader.world());
  row.mutable_attributes()->insert(header.attributes.begin(),
                                   header.attributes.end());
}

auto AgeOf(const v1::Checkpoint& row) {
  return std::make_tuple(row.create_time().seconds(), row.create_time().nanos(),
                         row.path());
}

}  // namespace

std::string CheckpointCatalogue::DirectoryOf(const CheckpointRef& ref) const {
  return jobs_directory_ + "/" + ref.job_id + "/checkpoints/" + ref.name;
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

absl::StatusOr<std::vector<v1::Checkpoint>> CheckpointCatalogue::List(
    const std::string& job_id) const {
  std::vector<std::string> jobs = {job_id};
  if (job_id.empty()) {
    GW_ASSIGN_OR_RETURN(jobs, NamesIn(jobs_directory_));
  }
  std::vector<v1::Checkpoint> rows;
  for (const std::string& job : jobs) {
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
        *row->mutable_error() = ToOperationError(why);
      }
      rows.push_back(*std::move(row));
    }
  }
  std::sort(rows.begin(), rows.end(),
            [](const auto& a, const auto& b) { return AgeOf(a) < AgeOf(b); });
  return rows;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::Get(
    const CheckpointRef& ref) const {
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<StateReader> reader,
                      StateReader::Open(PosixFileSystem(), DirectoryOf(ref)));
  v1::Checkpoint row = Row(ref);
  Fill(*reader, row);
  return row;
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::Verify(
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
  v1::Checkpoint row = Row(ref);
  GW_RETURN_IF_ERROR(RemoveState(PosixFileSystem(), DirectoryOf(ref)));
  return row;
}

}  // namespace gradwire
