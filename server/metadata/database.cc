// SPDX-License-Identifier: Apache-2.0
#include "server/metadata/database.h"

#include <sqlite3.h>

#include <cerrno>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

// Of another process that looks at the file, an operator's shell say.
constexpr int kBusyMilliseconds = 5000;

// SQLite calls a database damaged, too, that the disk does not give back.
bool CannotRead(sqlite3* handle) {
  for (int which : {SQLITE_FCNTL_FILE_POINTER, SQLITE_FCNTL_JOURNAL_POINTER}) {
    sqlite3_file* file = nullptr;
    sqlite3_file_control(handle, "main", which, &file);
    if (file == nullptr || file->pMethods == nullptr) continue;
    int error = 0;
    file->pMethods->xFileControl(file, SQLITE_FCNTL_LAST_ERRNO, &error);
    if (error == EIO) return true;
  }
  return false;
}

absl::Status Failure(sqlite3* handle, int result) {
  const std::string said = sqlite3_errmsg(handle);
  result &= 0xff;
  if (result == SQLITE_CORRUPT && CannotRead(handle)) result = SQLITE_IOERR;
  switch (result) {
    case SQLITE_FULL:
      return ErrorBuilder(absl::StatusCode::kResourceExhausted, "STORAGE_FULL")
          .Server()
          .With("operation", "metadata")
          .Message(
              "The server's disk is full, so that nothing can be "
              "recorded. Free some space and try again.");
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return ErrorBuilder(absl::StatusCode::kDataLoss, "METADATA_CORRUPT")
          .Server()
          .With("cause", said)
          .Message("The server's metadata is damaged (" + said +
                   "). Restore gradwire.db of the state directory from a "
                   "backup.");
    default:
      return ErrorBuilder(absl::StatusCode::kUnavailable, "STORAGE_IO")
          .Server()
          .With("operation", "metadata")
          .With("cause", said)
          .Message("The server's metadata cannot be read or written (" + said +
                   "). Look at the disk of its state directory.");
  }
}

}  // namespace

Statement::~Statement() { sqlite3_finalize(statement_); }

Statement& Statement::Bind(int64_t value) {
  sqlite3_bind_int64(statement_, ++bound_, value);
  return *this;
}

Statement& Statement::Bind(std::string_view text) {
  sqlite3_bind_text64(statement_, ++bound_, text.data(), text.size(),
                      SQLITE_TRANSIENT, SQLITE_UTF8);
  return *this;
}

Statement& Statement::BindBlob(std::string_view bytes) {
  // An empty blob, rather than NULL.
  sqlite3_bind_blob64(statement_, ++bound_, bytes.empty() ? "" : bytes.data(),
                      bytes.size(), SQLITE_TRANSIENT);
  return *this;
}

absl::StatusOr<bool> Statement::Step() {
  const int result = sqlite3_step(statement_);
  if (result == SQLITE_ROW) return true;
  if (result == SQLITE_DONE) return false;
  return Failure(sqlite3_db_handle(statement_), result);
}

absl::Status Statement::Run() { return Step().status(); }

int64_t Statement::Int(int column) const {
  return sqlite3_column_int64(statement_, column);
}

std::string Statement::Bytes(int column) const {
  const void* bytes = sqlite3_column_blob(statement_, column);
  const int count = sqlite3_column_bytes(statement_, column);
  return std::string(static_cast<const char*>(bytes),
                     static_cast<size_t>(count));
}

absl::StatusOr<std::unique_ptr<Database>> Database::Open(
    const std::string& path, const std::vector<const char*>& migrations) {
  sqlite3* handle = nullptr;
  const int opened = sqlite3_open_v2(
      path.c_str(), &handle,
      SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX,
      nullptr);
  std::unique_ptr<Database> database(new Database(handle));
  if (opened != SQLITE_OK) return Failure(handle, opened);
  sqlite3_extended_result_codes(handle, 1);
  sqlite3_busy_timeout(handle, kBusyMilliseconds);
  GW_RETURN_IF_ERROR(database->Execute("PRAGMA journal_mode=WAL"));
  GW_RETURN_IF_ERROR(database->Execute("PRAGMA synchronous=FULL"));
  // Pages of the write-ahead log: so little that what is written again and
  // again takes no space that a full disk would not have.
  GW_RETURN_IF_ERROR(database->Execute("PRAGMA wal_autocheckpoint=32"));
  GW_RETURN_IF_ERROR(database->Execute("PRAGMA foreign_keys=ON"));

  int64_t have = 0;
  {
    GW_ASSIGN_OR_RETURN(Statement version,
                        database->Prepare("PRAGMA user_version"));
    GW_RETURN_IF_ERROR(version.Step().status());
    have = version.Int(0);
  }
  const auto need = static_cast<int64_t>(migrations.size());
  if (have > need) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "STATE_VERSION")
        .Server()
        .With("have", have)
        .With("need", need)
        .Message("The state directory's metadata has schema " +
                 std::to_string(have) + " and this server knows schema " +
                 std::to_string(need) +
                 ". Start the version of the server that wrote it, or a newer "
                 "one.");
  }
  for (; have < need; ++have) {
    const std::string sql = "BEGIN IMMEDIATE;" +
                            std::string(migrations[static_cast<size_t>(have)]) +
                            ";PRAGMA user_version=" + std::to_string(have + 1) +
                            ";COMMIT";
    GW_RETURN_IF_ERROR(database->Execute(sql.c_str()));
  }
  return database;
}

Database::~Database() { sqlite3_close_v2(handle_); }

absl::StatusOr<Statement> Database::Prepare(const char* sql) {
  sqlite3_stmt* statement = nullptr;
  const int result = sqlite3_prepare_v2(handle_, sql, -1, &statement, nullptr);
  if (result != SQLITE_OK) return Failure(handle_, result);
  return Statement(statement);
}

absl::Status Database::Execute(const char* sql) {
  const int result = sqlite3_exec(handle_, sql, nullptr, nullptr, nullptr);
  return result == SQLITE_OK ? absl::OkStatus() : Failure(handle_, result);
}

}  // namespace gradwire
