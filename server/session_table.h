// SPDX-License-Identifier: Apache-2.0
// Sessions: one for each client process, kept alive by heartbeats.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "gradwire/v1/operations.pb.h"
#include "server/metadata/metadata.h"
#include "server/operation.h"

namespace gradwire {

// Thread rule: all methods from any thread. Lock order: a job's mutex may be
// held, nothing else.
class SessionTable {
 public:
  SessionTable();

  // Takes the sessions that an earlier server had; from now on `metadata`,
  // which outlives the table, knows of all. Errors: those of Metadata.
  absl::Status Restore(Metadata* metadata);

  // Errors: those of Metadata.
  absl::StatusOr<std::string> Create();
  // Errors of all below, too: NOT_FOUND SESSION_NOT_FOUND.
  absl::Status Heartbeat(const std::string& session_id);
  absl::Status Finish(const std::string& session_id);
  absl::Status Check(const std::string& session_id) const;

  // The last sign of life; the epoch for an unknown or finished session.
  Clock::time_point LastSeen(const std::string& session_id) const;

  // Appends a completion. Unknown sessions are passed over.
  void Publish(const std::string& session_id, const v1::Operation& operation);

  // Completions after `cursor`; waits up to `timeout` for the first.
  absl::StatusOr<std::vector<v1::OperationEvent>> Read(
      const std::string& session_id, int64_t cursor, absl::Duration timeout);

 private:
  struct Session {
    Clock::time_point last_seen;
    bool finished = false;
    std::deque<v1::OperationEvent> events;
    int64_t last_cursor = 0;
  };
  absl::Status NotFound(const std::string& session_id) const;
  // Sessions that have been silent for hours leave the table.
  void Forget(Clock::time_point now);

  Metadata* metadata_ = nullptr;  // set before there are other threads
  mutable absl::Mutex mu_;
  absl::CondVar changed_;
  std::map<std::string, Session> sessions_;
};

// `bytes` random bytes in hexadecimal, for identities and tokens.
std::string RandomHex(int bytes);

}  // namespace gradwire
