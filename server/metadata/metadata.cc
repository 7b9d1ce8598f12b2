// SPDX-License-Identifier: Apache-2.0
#include "server/metadata/metadata.h"

#include "base/status.h"
#include "checkpoint/fence.h"

namespace gradwire {
namespace {

// One text a version of the schema; a text that has been released never
// changes.
const std::vector<const char*>& Migrations() {
  static const auto* const migrations = new std::vector<const char*>{
      R"(
CREATE TABLE lease (
  only INTEGER PRIMARY KEY CHECK (only = 1),
  epoch INTEGER NOT NULL);
INSERT INTO lease VALUES (1, 0);
CREATE TABLE sessions (
  session_id TEXT PRIMARY KEY,
  finished INTEGER NOT NULL);
CREATE TABLE jobs (
  ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
  job_id TEXT NOT NULL UNIQUE,
  spec BLOB NOT NULL,
  created_microseconds INTEGER NOT NULL,
  state INTEGER NOT NULL,
  error BLOB NOT NULL,
  profile BLOB NOT NULL,
  log_watermark INTEGER NOT NULL,
  log_begin INTEGER NOT NULL);
CREATE TABLE handles (
  job_id TEXT NOT NULL,
  number INTEGER NOT NULL,
  model_id TEXT NOT NULL,
  session_id TEXT NOT NULL,
  request BLOB NOT NULL,
  attached INTEGER NOT NULL,
  closed_below INTEGER NOT NULL,
  fenced INTEGER NOT NULL,
  PRIMARY KEY (job_id, number)) WITHOUT ROWID;
CREATE TABLE operations (
  job_id TEXT NOT NULL,
  handle INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  outcome BLOB NOT NULL,
  PRIMARY KEY (job_id, handle, seq)) WITHOUT ROWID;
CREATE TABLE recovery_points (
  job_id TEXT NOT NULL,
  number INTEGER NOT NULL,
  replay_from INTEGER NOT NULL,
  optimizer_step INTEGER NOT NULL,
  weight_version INTEGER NOT NULL,
  PRIMARY KEY (job_id, number)) WITHOUT ROWID)",
      // A name of its own among all servers that share an object store.
      R"(
CREATE TABLE server (
  only INTEGER PRIMARY KEY CHECK (only = 1),
  id TEXT NOT NULL);
INSERT INTO server VALUES (1, lower(hex(randomblob(6)))))",
      R"(
CREATE TABLE checkpoints (
  path TEXT PRIMARY KEY,
  job_id TEXT NOT NULL,
  digest TEXT NOT NULL,
  kind TEXT NOT NULL,
  promotable INTEGER NOT NULL,
  created_microseconds INTEGER NOT NULL,
  expires_microseconds INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX checkpoints_of_job
  ON checkpoints (job_id, created_microseconds);
CREATE TABLE removals (
  path TEXT PRIMARY KEY,
  digest TEXT NOT NULL) WITHOUT ROWID)",
      // Of one name several may be to go.
      R"(
ALTER TABLE removals RENAME TO removals_by_path;
CREATE TABLE removals (
  path TEXT NOT NULL,
  digest TEXT NOT NULL,
  PRIMARY KEY (path, digest)) WITHOUT ROWID;
INSERT INTO removals SELECT path, digest FROM removals_by_path;
DROP TABLE removals_by_path)",
      R"(
CREATE TABLE kernel_choices (
  ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
  job_id TEXT NOT NULL,
  rank INTEGER NOT NULL,
  choices BLOB NOT NULL);
CREATE INDEX kernel_choices_of_job ON kernel_choices (job_id, ordinal))",
  };
  return *migrations;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Metadata>> Metadata::Open(
    const std::string& path, int64_t seen) {
  std::unique_ptr<Metadata> metadata(new Metadata);
  GW_ASSIGN_OR_RETURN(metadata->database_, Database::Open(path, Migrations()));
  Database& database = *metadata->database_;
  GW_ASSIGN_OR_RETURN(
      Statement lease,
      database.Prepare(
          "UPDATE lease SET epoch = max(epoch, ?) + 1 RETURNING epoch"));
  GW_RETURN_IF_ERROR(lease.Bind(seen).Step().status());
  metadata->epoch_ = lease.Int(0);
  // It has not been committed before it is through.
  GW_RETURN_IF_ERROR(lease.Run());
  GW_ASSIGN_OR_RETURN(Statement server,
                      database.Prepare("SELECT id FROM server"));
  GW_RETURN_IF_ERROR(server.Step().status());
  metadata->server_id_ = server.Bytes(0);
  return metadata;
}

absl::Status Metadata::Transact(const std::function<absl::Status()>& write) {
  std::lock_guard<std::mutex> lock(mutex_);
  absl::Status status = TransactOnce(write);
  if (!absl::IsResourceExhausted(status)) return status;
  // The disk is full, also of transactions that the database itself may have by
  // now: then their space is free.
  const auto truncated = database_->Execute("PRAGMA wal_checkpoint(TRUNCATE)");
  return truncated.ok() ? TransactOnce(write) : status;
}

absl::Status Metadata::TransactOnce(
    const std::function<absl::Status()>& write) {
  GW_RETURN_IF_ERROR(database_->Execute("BEGIN IMMEDIATE"));
  const auto run = [&]() -> absl::Status {
    {
      GW_ASSIGN_OR_RETURN(Statement lease,
                          database_->Prepare("SELECT epoch FROM lease"));
      GW_RETURN_IF_ERROR(lease.Step().status());
      if (const int64_t highest = lease.Int(0); highest != epoch_) {
        return EpochFenced(epoch_, highest);
      }
    }
    GW_RETURN_IF_ERROR(write());
    return database_->Execute("COMMIT");
  };
  absl::Status status = run();
  // Fails where SQLite has rolled back by itself.
  if (!status.ok()) database_->Execute("ROLLBACK").IgnoreError();
  return status;
}

absl::Status Metadata::AddSession(const std::string& session_id) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement add,
        database_->Prepare("INSERT INTO sessions VALUES (?, 0)"));
    return add.Bind(session_id).Run();
  });
}

absl::Status Metadata::FinishSession(const std::string& session_id) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement finish,
        database_->Prepare(
            "UPDATE sessions SET finished = 1 WHERE session_id = ?"));
    return finish.Bind(session_id).Run();
  });
}

absl::StatusOr<std::vector<SessionRow>> Metadata::Sessions() {
  std::lock_guard<std::mutex> lock(mutex_);
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database_->Prepare("SELECT session_id, finished FROM sessions"));
  std::vector<SessionRow> rows;
  while (true) {
    GW_ASSIGN_OR_RETURN(const bool more, find.Step());
    if (!more) return rows;
    rows.push_back({find.Bytes(0), find.Int(1) != 0});
  }
}

absl::Status Metadata::AddJob(const JobRow& job) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement add,
        database_->Prepare(
            "INSERT INTO jobs (job_id, spec, created_microseconds, state, "
            "error, profile, log_watermark, log_begin) "
            "VALUES (?, ?, ?, ?, ?, ?, 0, 0)"));
    return add.Bind(job.job_id)
        .BindBlob(job.spec)
        .Bind(job.created_microseconds)
        .Bind(int64_t{job.state})
        .BindBlob(job.error)
        .BindBlob(job.profile)
        .Run();
  });
}

absl::Status Metadata::ForgetJob(const std::string& job_id) {
  return Transact([&]() -> absl::Status {
    for (const char* sql : {"DELETE FROM jobs WHERE job_id = ?",
                            "DELETE FROM kernel_choices WHERE job_id = ?"}) {
      GW_ASSIGN_OR_RETURN(Statement remove, database_->Prepare(sql));
      GW_RETURN_IF_ERROR(remove.Bind(job_id).Run());
    }
    return absl::OkStatus();
  });
}

absl::Status Metadata::SetJobState(const std::string& job_id,
                                   JobRow::State state,
                                   const std::string& error) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement set,
        database_->Prepare("UPDATE jobs SET state = ?, error = ? "
                           "WHERE job_id = ? AND state != ?"));
    GW_RETURN_IF_ERROR(set.Bind(int64_t{state})
                           .BindBlob(error)
                           .Bind(job_id)
                           .Bind(int64_t{JobRow::kDeleted})
                           .Run());
    if (state != JobRow::kDeleted) return absl::OkStatus();
    for (const char* sql : {"DELETE FROM handles WHERE job_id = ?",
                            "DELETE FROM operations WHERE job_id = ?",
                            "DELETE FROM recovery_points WHERE job_id = ?",
                            "DELETE FROM kernel_choices WHERE job_id = ?"}) {
      GW_ASSIGN_OR_RETURN(Statement remove, database_->Prepare(sql));
      GW_RETURN_IF_ERROR(remove.Bind(job_id).Run());
    }
    return absl::OkStatus();
  });
}

absl::Status Metadata::SetProfile(const std::string& job_id,
                                  const std::string& profile) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement set,
        database_->Prepare("UPDATE jobs SET profile = ? WHERE job_id = ?"));
    return set.BindBlob(profile).Bind(job_id).Run();
  });
}

absl::Status Metadata::AddChoices(const std::string& job_id,
                                  const std::vector<KernelChoicesRow>& rows) {
  return Transact([&]() -> absl::Status {
    for (const KernelChoicesRow& row : rows) {
      GW_ASSIGN_OR_RETURN(
          Statement add,
          database_->Prepare(
              "INSERT INTO kernel_choices (job_id, rank, choices) "
              "SELECT job_id, ?, ? FROM jobs WHERE job_id = ? AND state != ?"));
      GW_RETURN_IF_ERROR(add.Bind(int64_t{row.rank})
                             .BindBlob(row.choices)
                             .Bind(job_id)
                             .Bind(int64_t{JobRow::kDeleted})
                             .Run());
    }
    return absl::OkStatus();
  });
}

absl::StatusOr<std::vector<KernelChoicesRow>> Metadata::Choices(
    const std::string& job_id) {
  std::lock_guard<std::mutex> lock(mutex_);
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database_->Prepare("SELECT rank, choices FROM kernel_choices "
                         "WHERE job_id = ? ORDER BY ordinal"));
  find.Bind(job_id);
  std::vector<KernelChoicesRow> rows;
  while (true) {
    GW_ASSIGN_OR_RETURN(const bool more, find.Step());
    if (!more) return rows;
    rows.push_back({static_cast<int>(find.Int(0)), find.Bytes(1)});
  }
}

absl::StatusOr<std::vector<JobRow>> Metadata::Jobs() {
  std::lock_guard<std::mutex> lock(mutex_);
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database_->Prepare(
          "SELECT job_id, spec, created_microseconds, state, error, profile, "
          "log_watermark, log_begin FROM jobs ORDER BY ordinal"));
  std::vector<JobRow> rows;
  while (true) {
    GW_ASSIGN_OR_RETURN(const bool more, find.Step());
    if (!more) return rows;
    JobRow& row = rows.emplace_back();
    row.job_id = find.Bytes(0);
    row.spec = find.Bytes(1);
    row.created_microseconds = find.Int(2);
    row.state = static_cast<JobRow::State>(find.Int(3));
    row.error = find.Bytes(4);
    row.profile = find.Bytes(5);
    row.log_watermark = find.Int(6);
    row.log_begin = find.Int(7);
  }
}

absl::Status Metadata::AddHandle(const std::string& job_id,
                                 const HandleRow& handle) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement add,
        database_->Prepare(
            "INSERT INTO handles VALUES (?, ?, ?, ?, ?, ?, ?, ?)"));
    return add.Bind(job_id)
        .Bind(handle.number)
        .Bind(handle.model_id)
        .Bind(handle.session_id)
        .BindBlob(handle.request)
        .Bind(int64_t{handle.attached})
        .Bind(handle.closed_below)
        .Bind(int64_t{handle.fenced})
        .Run();
  });
}

absl::Status Metadata::FenceHandles(const std::string& job_id) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement fence,
        database_->Prepare("UPDATE handles SET fenced = 1 WHERE job_id = ?"));
    return fence.Bind(job_id).Run();
  });
}

absl::StatusOr<std::vector<HandleRow>> Metadata::Handles(
    const std::string& job_id) {
  std::lock_guard<std::mutex> lock(mutex_);
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database_->Prepare("SELECT number, model_id, session_id, request, "
                         "attached, closed_below, fenced FROM handles "
                         "WHERE job_id = ? ORDER BY number"));
  find.Bind(job_id);
  std::vector<HandleRow> rows;
  while (true) {
    GW_ASSIGN_OR_RETURN(const bool more, find.Step());
    if (!more) return rows;
    HandleRow& row = rows.emplace_back();
    row.number = find.Int(0);
    row.model_id = find.Bytes(1);
    row.session_id = find.Bytes(2);
    row.request = find.Bytes(3);
    row.attached = find.Int(4) != 0;
    row.closed_below = find.Int(5);
    row.fenced = find.Int(6) != 0;
  }
}

absl::Status Metadata::SetWatermark(const std::string& job_id,
                                    int64_t watermark) {
  return Transact([&]() -> absl::Status {
    GW_ASSIGN_OR_RETURN(
        Statement set,
        database_->Prepare(
            "UPDATE jobs SET log_watermark = ? WHERE job_id = ?"));
    return set.Bind(watermark).Bind(job_id).Run();
  });
}

absl::Status Metadata::AddReference(const std::string& job_id,
                                    const Reference& reference) {
  return Transact([&]() -> absl::Status {
    for (const OperationRow& row : reference.operations) {
      GW_ASSIGN_OR_RETURN(
          Statement add,
          database_->Prepare(
              "INSERT OR REPLACE INTO operations VALUES (?, ?, ?, ?)"));
      GW_RETURN_IF_ERROR(add.Bind(job_id)
                             .Bind(row.handle)
                             .Bind(row.seq)
                             .BindBlob(row.outcome)
                             .Run());
    }
    for (const auto& [handle, closed_below] : reference.closed) {
      GW_ASSIGN_OR_RETURN(
          Statement close,
          database_->Prepare("UPDATE handles SET closed_below = ? "
                             "WHERE job_id = ? AND number = ?"));
      GW_RETURN_IF_ERROR(
          close.Bind(closed_below).Bind(job_id).Bind(handle).Run());
    }
    if (const RecoveryPoint* point = reference.point; point != nullptr) {
      GW_ASSIGN_OR_RETURN(
          Statement add,
          database_->Prepare(
              "INSERT INTO recovery_points VALUES (?, ?, ?, ?, ?)"));
      GW_RETURN_IF_ERROR(add.Bind(job_id)
                             .Bind(point->number)
                             .Bind(point->replay_from)
                             .Bind(point->optimizer_step)
                             .Bind(point->weight_version)
                             .Run());
      GW_ASSIGN_OR_RETURN(
          Statement remove,
          database_->Prepare("DELETE FROM recovery_points "
                             "WHERE job_id = ? AND number < ?"));
      GW_RETURN_IF_ERROR(
          remove.Bind(job_id).Bind(reference.oldest_point).Run());
    }
    GW_ASSIGN_OR_RETURN(
        Statement begin,
        database_->Prepare("UPDATE jobs SET log_begin = ? WHERE job_id = ?"));
    return begin.Bind(reference.log_begin).Bind(job_id).Run();
  });
}

absl::StatusOr<std::vector<OperationRow>> Metadata::Operations(
    const std::string& job_id) {
  std::lock_guard<std::mutex> lock(mutex_);
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database_->Prepare("SELECT handle, seq, outcome FROM operations "
                         "WHERE job_id = ? ORDER BY handle, seq"));
  find.Bind(job_id);
  std::vector<OperationRow> rows;
  while (true) {
    GW_ASSIGN_OR_RETURN(const bool more, find.Step());
    if (!more) return rows;
    rows.push_back({find.Int(0), find.Int(1), find.Bytes(2)});
  }
}

absl::StatusOr<std::vector<RecoveryPoint>> Metadata::Points(
    const std::string& job_id) {
  std::lock_guard<std::mutex> lock(mutex_);
  GW_ASSIGN_OR_RETURN(
      Statement find,
      database_->Prepare(
          "SELECT number, replay_from, optimizer_step, weight_version "
          "FROM recovery_points WHERE job_id = ? ORDER BY number"));
  find.Bind(job_id);
  std::vector<RecoveryPoint> rows;
  while (true) {
    GW_ASSIGN_OR_RETURN(const bool more, find.Step());
    if (!more) return rows;
    rows.push_back({find.Int(0), find.Int(1), find.Int(2), find.Int(3)});
  }
}

}  // namespace gradwire
