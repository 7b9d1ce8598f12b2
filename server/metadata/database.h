// SPDX-License-Identifier: Apache-2.0
// SQLite as the rest of the server sees it: a file with a schema of a known
// version, prepared statements, and transactions that are on the disk when they
// have been committed (WAL, synchronous=FULL).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

struct sqlite3;
struct sqlite3_stmt;

namespace gradwire {

// One prepared statement. Parameters are bound in order; blobs and texts are
// copied. Not for use by several threads.
class Statement {
 public:
  explicit Statement(sqlite3_stmt* statement) : statement_(statement) {}
  ~Statement();
  Statement(Statement&& other) noexcept
      : statement_(other.statement_), bound_(other.bound_) {
    other.statement_ = nullptr;
  }
  Statement(const Statement&) = delete;

  Statement& Bind(int64_t value);
  Statement& Bind(std::string_view text);
  Statement& BindBlob(std::string_view bytes);

  // True: there is a row to read. Errors: those of Database.
  absl::StatusOr<bool> Step();
  // Runs a statement that gives no rows.
  absl::Status Run();

  // Of the row, from 0.
  int64_t Int(int column) const;
  std::string Bytes(int column) const;

 private:
  sqlite3_stmt* statement_;
  int bound_ = 0;
};

// Errors of all methods: RESOURCE_EXHAUSTED STORAGE_FULL; UNAVAILABLE
// STORAGE_IO; DATA_LOSS METADATA_CORRUPT.
//
// Not for use by several threads.
class Database {
 public:
  // Opens or makes the file; brings its schema to the newest version by running
  // those of `migrations` that it has not seen, each in one transaction.
  // Errors: FAILED_PRECONDITION STATE_VERSION (have, need): a newer server has
  // written it.
  static absl::StatusOr<std::unique_ptr<Database>> Open(
      const std::string& path, const std::vector<const char*>& migrations);
  ~Database();
  Database(const Database&) = delete;

  absl::StatusOr<Statement> Prepare(const char* sql);
  absl::Status Execute(const char* sql);

 private:
  explicit Database(sqlite3* handle) : handle_(handle) {}

  sqlite3* const handle_;
};

}  // namespace gradwire
