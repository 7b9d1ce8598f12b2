// SPDX-License-Identifier: Apache-2.0
// What the op-log's tests have in common.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "server/oplog/oplog.h"

namespace gradwire {

inline constexpr char kLogDirectory[] = "/log";

// A record with a payload of its own.
struct LogRecord {
  OplogType type = OplogType::kOp;
  int64_t handle = 0;
  int64_t seq_id = 0;
  int64_t begin = 0;  // log offsets
  int64_t end = 0;
  std::string payload;

  bool operator==(const LogRecord&) const = default;
};

// Segments of 400 bytes, or as given, and random numbers that are the same each
// time.
OplogOptions SmallOptions(int64_t epoch, int64_t segment_bytes = 400);

// Record number `number` of a test, with a payload of so many bytes.
LogRecord MakeRecord(int64_t number, int64_t payload_bytes);
// Appends it, and fills in where it is.
absl::Status AppendTo(Oplog& log, int64_t epoch, LogRecord* record);

// The records of the log from begin() on, without its own (epochs, seals).
absl::StatusOr<std::vector<LogRecord>> RecordsOf(const Oplog& log);
// All of them.
absl::StatusOr<std::vector<LogRecord>> AllRecordsOf(const Oplog& log);

std::string ReasonOf(const absl::Status& status);
std::string MetadataOf(const absl::Status& status, const std::string& key);

}  // namespace gradwire
