// SPDX-License-Identifier: Apache-2.0
// What the metadata say of checkpoints and snapshots.
#include <algorithm>

#include "absl/strings/str_split.h"
#include "base/status.h"
#include "server/metadata/metadata.h"

namespace gradwire {
namespace {

constexpr char kColumns[] =
    "SELECT path, digest, kind, promotable, created_microseconds, "
    "expires_microseconds FROM checkpoints ";

CheckpointRow Read(const Statement& found) {
  CheckpointRow row;
  row.path = found.Bytes(0);
  row.digest = found.Bytes(1);
  row.kind = found.Bytes(2);
  row.promotable = found.Int(3) != 0;
  row.created_microseconds = found.Int(4);
  row.expires_microseconds = found.Int(5);
  return row;
}

// "job" of "jobs/job/checkpoints/name".
std::string JobOf(const std::string& path) {
  const std::vector<std::string> segments = absl::StrSplit(path, '/');
  return segments.size() > 1 ? segments[1] : "";
}

absl::Status Put(Database& database, const CheckpointRow& row) {
  GW_ASSIGN_OR_RETURN(Statement put,
                      database.Prepare("INSERT OR REPLACE INTO checkpoints "
                                       "VALUES (?, ?, ?, ?, ?, ?, ?)"));
  return put.Bind(row.path)
      .Bind(JobOf(row.path))
      .Bind(row.digest)
      .Bind(row.kind)
      .Bind(int64_t{row.promotable})
      .Bind(row.created_microseconds)
      .Bind(row.expires_microseconds)
      .Run();
}

absl::StatusOr<std::optional<CheckpointRow>> Find(Database& database,
                                                  const std::string& path) {
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database.Prepare((std::string(kColumns) + "WHERE path = ?").c_str()));
  GW_ASSIGN_OR_RETURN(const bool there, find.Bind(path).Step());
  if (!there) return std::nullopt;
  return Read(find);
}

absl::Status Add(Database& database, CheckpointRow row) {
  GW_ASSIGN_OR_RETURN(
      Statement newest,
      database.Prepare("SELECT max(created_microseconds) FROM checkpoints "
                       "WHERE job_id = ?"));
  GW_RETURN_IF_ERROR(newest.Bind(JobOf(row.path)).Step().status());
  const int64_t created = std::max(row.created_microseconds, newest.Int(0) + 1);
  if (row.expires_microseconds != 0) {
    row.expires_microseconds += created - row.created_microseconds;
  }
  row.created_microseconds = created;
  return Put(database, row);
}

absl::Status Insert(Database& database, const RemovalRow& row) {
  GW_ASSIGN_OR_RETURN(
      Statement add,
      database.Prepare("INSERT OR REPLACE INTO removals VALUES (?, ?)"));
  return add.Bind(row.path).Bind(row.digest).Run();
}

}  // namespace

absl::Status Metadata::AddCheckpoint(const CheckpointRow& row) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(const auto known, Find(*database_, row.path));
    GW_RETURN_IF_ERROR(NoteReplaced(known, row));
    return Add(*database_, row);
  });
}

absl::Status Metadata::PutCheckpoint(const CheckpointRow& row) {
  return Transact([&] { return Put(*database_, row); });
}

absl::Status Metadata::LearnCheckpoint(const CheckpointRow& row) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(const auto known, Find(*database_, row.path));
    if (known.has_value() && known->digest == row.digest) {
      return absl::OkStatus();
    }
    GW_RETURN_IF_ERROR(NoteReplaced(known, row));
    return Put(*database_, row);
  });
}

absl::StatusOr<bool> Metadata::ChangeCheckpoint(const CheckpointRow& row) {
  bool changed = false;
  GW_RETURN_IF_ERROR(Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(const auto known, Find(*database_, row.path));
    changed = !known.has_value() || known->digest == row.digest;
    return changed ? Put(*database_, row) : absl::OkStatus();
  }));
  return changed;
}

absl::Status Metadata::ForgetCheckpoint(const std::string& path,
                                        const std::string& digest) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement forget,
        database_->Prepare(
            "DELETE FROM checkpoints WHERE path = ? AND digest = ?"));
    return forget.Bind(path).Bind(digest).Run();
  });
}

absl::StatusOr<std::optional<CheckpointRow>> Metadata::FindCheckpoint(
    const std::string& path) {
  std::lock_guard<std::mutex> lock(mutex_);
  return Find(*database_, path);
}

absl::StatusOr<std::vector<CheckpointRow>> Metadata::Checkpoints() {
  std::lock_guard<std::mutex> lock(mutex_);
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database_->Prepare((std::string(kColumns) + "ORDER BY path").c_str()));
  std::vector<CheckpointRow> rows;
  while (true) {
    GW_ASSIGN_OR_RETURN(const bool more, find.Step());
    if (!more) return rows;
    rows.push_back(Read(find));
  }
}

void Metadata::RememberReplaced() {
  const std::lock_guard<std::mutex> lock(mutex_);
  remember_replaced_ = true;
}

absl::Status Metadata::NoteReplaced(const std::optional<CheckpointRow>& known,
                                    const CheckpointRow& row) {
  const bool replaced = known.has_value() && known->digest != row.digest &&
                        known->kind == "training";
  if (!remember_replaced_ || !replaced) return absl::OkStatus();
  return Insert(*database_, RemovalRow{known->path, known->digest});
}

absl::Status Metadata::AddRemoval(const RemovalRow& row) {
  return Transact([&] { return Insert(*database_, row); });
}

absl::Status Metadata::EndRemoval(const RemovalRow& row) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement end,
        database_->Prepare(
            "DELETE FROM removals WHERE path = ? AND digest = ?"));
    return end.Bind(row.path).Bind(row.digest).Run();
  });
}

absl::StatusOr<std::vector<RemovalRow>> Metadata::Removals() {
  std::lock_guard<std::mutex> lock(mutex_);
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database_->Prepare("SELECT path, digest FROM removals ORDER BY path"));
  std::vector<RemovalRow> rows;
  while (true) {
    GW_ASSIGN_OR_RETURN(const bool more, find.Step());
    if (!more) return rows;
    rows.push_back({find.Bytes(0), find.Bytes(1)});
  }
}

}  // namespace gradwire
