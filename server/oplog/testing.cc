// SPDX-License-Identifier: Apache-2.0
#include "server/oplog/testing.h"

#include <random>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {

OplogOptions SmallOptions(int64_t epoch, int64_t segment_bytes) {
  OplogOptions options;
  options.expected.epoch = epoch;
  options.segment_bytes = segment_bytes;
  // Numerical Recipes' generator: quickly made, and tests make many.
  auto state = static_cast<uint32_t>(1000 + epoch);
  options.random = [state]() mutable {
    return state = state * 1664525 + 1013904223;
  };
  return options;
}

LogRecord MakeRecord(int64_t number, int64_t payload_bytes) {
  std::mt19937 random(static_cast<uint32_t>(number));
  LogRecord record = {
      .type = static_cast<OplogType>(1 + number % 4),
      .handle = number / 3,
      .seq_id = number,
      .payload = std::string(static_cast<size_t>(payload_bytes), '\0')};
  for (char& c : record.payload) c = static_cast<char>(random());
  return record;
}

absl::Status AppendTo(Oplog& log, int64_t epoch, LogRecord* record) {
  GW_ASSIGN_OR_RETURN(const Oplog::Range range,
                      log.Append({.type = record->type,
                                  .handle = record->handle,
                                  .seq_id = record->seq_id,
                                  .epoch = epoch,
                                  .payload = record->payload}));
  record->begin = range.begin;
  record->end = range.end;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<LogRecord>> AllRecordsOf(const Oplog& log) {
  std::vector<LogRecord> records;
  GW_RETURN_IF_ERROR(
      log.Read(log.begin(), [&](const OplogRecord& record) -> absl::Status {
        records.push_back({.type = record.header.type,
                           .handle = record.header.handle,
                           .seq_id = record.header.seq_id,
                           .begin = record.begin,
                           .end = record.end,
                           .payload = std::string(record.payload)});
        return absl::OkStatus();
      }));
  return records;
}

absl::StatusOr<std::vector<LogRecord>> RecordsOf(const Oplog& log) {
  GW_ASSIGN_OR_RETURN(std::vector<LogRecord> records, AllRecordsOf(log));
  std::erase_if(records, [](const LogRecord& record) {
    return record.type == OplogType::kEpoch || record.type == OplogType::kSeal;
  });
  return records;
}

std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : "";
}

std::string MetadataOf(const absl::Status& status, const std::string& key) {
  const auto detail = GetErrorDetail(status);
  if (!detail || !detail->metadata.contains(key)) return "";
  return detail->metadata.at(key);
}

}  // namespace gradwire
