// SPDX-License-Identifier: Apache-2.0
// When a checkpoint was made, when it goes, and that it does.
#include <sys/stat.h>

#include <cmath>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/error.h"
#include "base/status.h"
#include "checkpoint/publish.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/training_state.h"
#include "server/catalogue_rows.h"
#include "server/checkpoint_catalogue.h"

namespace gradwire {
namespace {

// As the metadata keep it.
CheckpointRow RowOf(const CheckpointRef& ref, const v1::Checkpoint& row) {
  CheckpointRow known;
  known.path = ref.path();
  known.digest = row.digest();
  known.kind = row.kind();
  known.promotable = row.promotable();
  known.created_microseconds = MicrosOf(row.create_time());
  if (row.has_expire_time()) {
    known.expires_microseconds = MicrosOf(row.expire_time());
  }
  return known;
}

}  // namespace

absl::StatusOr<std::vector<std::string>> NamesIn(FileSystem& files,
                                                 const std::string& directory) {
  auto names = files.List(directory);
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

void SetExpiry(int64_t micros, v1::Checkpoint& row) {
  if (micros == 0) {
    row.clear_expire_time();
  } else {
    SetTime(micros, *row.mutable_expire_time());
  }
}

bool HasExpired(const v1::Checkpoint& row, int64_t now_micros) {
  return row.has_expire_time() && MicrosOf(row.expire_time()) <= now_micros;
}

absl::Status CheckTtl(double seconds) {
  // A century.
  constexpr double kMost = 100.0 * 366 * 86400;
  if (seconds >= 0 && seconds <= kMost) return absl::OkStatus();
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "OPTION_OUT_OF_RANGE")
      .With("field", "ttl_seconds")
      .With("value", seconds)
      .With("limit", kMost)
      .Message("ttl_seconds must be 0 (kept) or up to a hundred years.");
}

std::mutex& CheckpointCatalogue::Removals() {
  // A state directory belongs to one process.
  static std::mutex mutex;
  return mutex;
}

absl::Status CheckpointCatalogue::RemoveUnfinished(
    const std::string& job_id) const {
  const std::lock_guard<std::mutex> lock(Removals());
  GW_RETURN_IF_ERROR(RecoverSnapshots(*files_, SnapshotsOf(job_id)));
  const std::string states =
      gradwire::DirectoryOf(DirectoryOf({job_id, "x", false}));
  GW_ASSIGN_OR_RETURN(const auto names, NamesIn(*files_, states));
  for (const std::string& name : names) {
    // Others are links to what is being copied to an object store.
    std::string purpose;
    if (PendingName(name, &purpose).empty() || !purpose.empty()) continue;
    GW_RETURN_IF_ERROR(RemoveIfThere(*files_, states + "/" + name));
  }
  return absl::OkStatus();
}

absl::Status CheckpointCatalogue::Saved(const CheckpointRef& ref, bool again,
                                        int64_t asked_micros) const {
  // What the metadata may know is of one that was equal and had this name.
  const auto row = ref.snapshot ? GetSnapshot(ref) : GetState(ref, Known());
  if (absl::IsNotFound(row.status())) return absl::OkStatus();
  GW_RETURN_IF_ERROR(row.status());
  CheckpointRow known = RowOf(ref, *row);
  if (again) {
    GW_ASSIGN_OR_RETURN(const auto before,
                        metadata_->FindCheckpoint(ref.path()));
    // Not of an equal one that this has replaced.
    if (before.has_value() && before->digest == known.digest &&
        before->created_microseconds >= asked_micros) {
      return absl::OkStatus();
    }
  }
  return metadata_->AddCheckpoint(known);
}

absl::Status CheckpointCatalogue::WillFetch(const CheckpointRef& ref,
                                            const std::string& digest,
                                            const std::string& kind,
                                            int64_t created_micros) const {
  // A sweep that has removed it forgets it as well, before this.
  const std::lock_guard<std::mutex> lock(Removals());
  GW_ASSIGN_OR_RETURN(const auto known, metadata_->FindCheckpoint(ref.path()));
  const auto has_expired = [](const CheckpointRow& row) {
    return row.expires_microseconds != 0 &&
           row.expires_microseconds <= absl::ToUnixMicros(absl::Now());
  };
  if (known.has_value() && known->digest == digest && !has_expired(*known)) {
    return absl::OkStatus();
  }
  CheckpointRow row;
  row.path = ref.path();
  row.digest = digest;
  row.kind = kind;
  row.promotable = ref.snapshot;
  row.created_microseconds = created_micros;
  return metadata_->PutCheckpoint(row);
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::SetTtl(
    const CheckpointRef& ref, double ttl_seconds) const {
  constexpr int kTries = 16;
  // None is removed meanwhile for the time that it had.
  const std::lock_guard<std::mutex> lock(Removals());
  for (int i = 0;; ++i) {
    GW_ASSIGN_OR_RETURN(v1::Checkpoint row, Get(ref));
    CheckpointRow known = RowOf(ref, row);
    known.expires_microseconds = 0;
    if (ttl_seconds > 0) {
      known.expires_microseconds =
          known.created_microseconds +
          static_cast<int64_t>(std::llround(ttl_seconds * 1e6));
    }
    // What it was to lose in a store, it keeps.
    GW_RETURN_IF_ERROR(metadata_->EndRemoval({known.path, known.digest}));
    GW_ASSIGN_OR_RETURN(bool changed, metadata_->ChangeCheckpoint(known));
    // Another one may have taken its name since; or what is known of this name
    // is older.
    if (!changed && i == kTries) {
      GW_RETURN_IF_ERROR(metadata_->PutCheckpoint(known));
      changed = true;
    }
    if (!changed) continue;
    SetExpiry(known.expires_microseconds, row);
    return row;
  }
}

absl::StatusOr<v1::Checkpoint> CheckpointCatalogue::Delete(
    const CheckpointRef& ref) const {
  const std::lock_guard<std::mutex> lock(Removals());
  v1::Checkpoint row = Row(ref);
  row.set_kind("training");
  std::string digest;
  if (ref.snapshot) {
    if (auto known = GetSnapshot(ref); known.ok()) row = *std::move(known);
    digest = row.digest();
    GW_RETURN_IF_ERROR(
        RemoveSnapshot(*files_, SnapshotsOf(ref.job_id), ref.name));
  } else {
    (void)ReadStateHeader(*files_, DirectoryOf(ref), &digest);
    GW_RETURN_IF_ERROR(RemoveState(*files_, DirectoryOf(ref)));
  }
  // If it stays, it says nothing of other files with this name.
  metadata_->ForgetCheckpoint(ref.path(), digest).IgnoreError();
  return row;
}

void CheckpointCatalogue::Learn(const CheckpointRef& ref, const Known& known,
                                const v1::Checkpoint& row) const {
  const auto found = known.find(row.path());
  if (found != known.end() && found->second.digest == row.digest()) return;
  // As its files say it. The next sweep tries it again.
  metadata_->LearnCheckpoint(RowOf(ref, row)).IgnoreError();
}

absl::Status CheckpointCatalogue::DeleteExpiredStates(
    const std::string& job, int64_t now_micros, const Known& known,
    const BeforeDelete& before, std::vector<Deleted>& deleted) const {
  GW_ASSIGN_OR_RETURN(
      const std::vector<std::string> names,
      NamesIn(*files_, jobs_directory_ + "/" + job + "/checkpoints"));
  absl::Status first;
  for (const std::string& name : names) {
    if (!CheckName(name, "name").ok()) continue;  // not yet one
    const CheckpointRef ref = {job, name};
    const std::string path = Row(ref).path();
    // Wherever it lies. One that is damaged stays for somebody to look at.
    std::string digest;
    const auto expired = [&](const std::string& directory) {
      const auto header = ReadStateHeader(*files_, directory, &digest);
      if (!header.ok()) return false;
      v1::Checkpoint row;
      row.set_path(path);
      row.set_local_path(directory);
      FillTime(row);
      Fill(*header, digest, known, row);
      Learn(ref, known, row);
      return HasExpired(row, now_micros);
    };
    if (!expired(DirectoryOf(ref))) continue;
    if (const absl::Status may = before(ref, digest); !may.ok()) {
      first.Update(may);
      continue;
    }
    const absl::StatusOr<bool> removed =
        RemoveStateIf(*files_, DirectoryOf(ref), expired);
    if (removed.ok() && *removed) {
      deleted.push_back({ref, digest});
      metadata_->ForgetCheckpoint(ref.path(), digest).IgnoreError();
    }
    if (!absl::IsNotFound(removed.status())) first.Update(removed.status());
  }
  return first;
}

absl::Status CheckpointCatalogue::DeleteExpired(
    absl::Time now, const BeforeDelete& before,
    std::vector<Deleted>& deleted) const {
  const std::lock_guard<std::mutex> lock(Removals());
  const int64_t now_micros = absl::ToUnixMicros(now);
  GW_ASSIGN_OR_RETURN(const auto jobs, NamesIn(*files_, jobs_directory_));
  GW_ASSIGN_OR_RETURN(const Known known, AllKnown());
  absl::Status first;
  for (const std::string& job : jobs) {
    first.Update(DeleteExpiredStates(job, now_micros, known, before, deleted));
    std::map<std::string, std::string> digests;
    const auto expires = [&](const SnapshotManifest& manifest) -> int64_t {
      const CheckpointRef ref = {job, manifest.name, true};
      v1::Checkpoint row;
      row.set_path("gradwire://" + ref.path());
      Fill(manifest, known, row);
      Learn(ref, known, row);
      if (!HasExpired(row, now_micros)) return 0;
      const absl::Status may = before(ref, manifest.digest);
      first.Update(may);
      digests[manifest.name] = manifest.digest;
      return may.ok() ? MicrosOf(row.expire_time()) : 0;
    };
    const auto names =
        RemoveExpired(*files_, SnapshotsOf(job), now_micros, expires);
    first.Update(names.status());
    if (!names.ok()) continue;
    for (const std::string& name : *names) {
      deleted.push_back({{job, name, true}, digests[name]});
      metadata_->ForgetCheckpoint(deleted.back().ref.path(), digests[name])
          .IgnoreError();
    }
  }
  return first;
}

}  // namespace gradwire
