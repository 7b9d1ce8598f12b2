// SPDX-License-Identifier: Apache-2.0
#include "server/session_table.h"

#include <sys/random.h>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

constexpr size_t kMaxEvents = 4096;
constexpr auto kForgetAfter = std::chrono::hours(24);

}  // namespace

std::string RandomHex(int bytes) {
  std::string raw(bytes, '\0');
  GW_CHECK(getrandom(raw.data(), raw.size(), 0) ==
           static_cast<ssize_t>(raw.size()));
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (unsigned char byte : raw) {
    out += kDigits[byte >> 4];
    out += kDigits[byte & 15];
  }
  return out;
}

SessionTable::SessionTable() = default;

absl::Status SessionTable::Restore(Metadata* metadata) {
  metadata_ = metadata;
  GW_ASSIGN_OR_RETURN(const auto rows, metadata->Sessions());
  absl::MutexLock lock(&mu_);
  for (const SessionRow& row : rows) {
    Session& session = sessions_[row.session_id];
    session.last_seen = Clock::now();
    session.finished = row.finished;
    // Above any that the earlier server has given.
    session.last_cursor = absl::ToUnixMicros(absl::Now());
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> SessionTable::Create() {
  const std::string id = "session-" + RandomHex(12);
  GW_RETURN_IF_ERROR(metadata_->AddSession(id));
  absl::MutexLock lock(&mu_);
  const auto now = Clock::now();
  Forget(now);
  sessions_[id].last_seen = now;
  return id;
}

void SessionTable::Forget(Clock::time_point now) {
  for (auto it = sessions_.begin(); it != sessions_.end();) {
    it = now - it->second.last_seen > kForgetAfter ? sessions_.erase(it)
                                                   : std::next(it);
  }
}

absl::Status SessionTable::NotFound(const std::string& session_id) const {
  return ErrorBuilder(absl::StatusCode::kNotFound, "SESSION_NOT_FOUND")
      .With("field", "session_id")
      .With("value", session_id.substr(0, 64))
      .Message("There is no such session. Create one.");
}

absl::Status SessionTable::Heartbeat(const std::string& session_id) {
  absl::MutexLock lock(&mu_);
  auto it = sessions_.find(session_id);
  if (it == sessions_.end()) return NotFound(session_id);
  if (!it->second.finished) it->second.last_seen = Clock::now();
  return absl::OkStatus();
}

absl::Status SessionTable::Finish(const std::string& session_id) {
  {
    absl::MutexLock lock(&mu_);
    auto it = sessions_.find(session_id);
    if (it == sessions_.end()) return NotFound(session_id);
    it->second.finished = true;
    changed_.SignalAll();
  }
  return metadata_->FinishSession(session_id);
}

absl::Status SessionTable::Check(const std::string& session_id) const {
  absl::MutexLock lock(&mu_);
  auto it = sessions_.find(session_id);
  if (it == sessions_.end()) return NotFound(session_id);
  if (it->second.finished) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "SESSION_FINISHED")
        .With("field", "session_id")
        .With("value", session_id)
        .Message("The session was finished. Create another one.");
  }
  return absl::OkStatus();
}

Clock::time_point SessionTable::LastSeen(const std::string& session_id) const {
  absl::MutexLock lock(&mu_);
  auto it = sessions_.find(session_id);
  if (it == sessions_.end() || it->second.finished) return {};
  return it->second.last_seen;
}

void SessionTable::Publish(const std::string& session_id,
                           const v1::Operation& operation) {
  absl::MutexLock lock(&mu_);
  auto it = sessions_.find(session_id);
  if (it == sessions_.end()) return;
  Session& session = it->second;
  v1::OperationEvent event;
  event.set_cursor(++session.last_cursor);
  *event.mutable_operation() = operation;
  session.events.push_back(std::move(event));
  if (session.events.size() > kMaxEvents) session.events.pop_front();
  changed_.SignalAll();
}

absl::StatusOr<std::vector<v1::OperationEvent>> SessionTable::Read(
    const std::string& session_id, int64_t cursor, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&mu_);
  while (true) {
    auto it = sessions_.find(session_id);
    if (it == sessions_.end()) return NotFound(session_id);
    std::vector<v1::OperationEvent> out;
    for (const v1::OperationEvent& event : it->second.events) {
      if (event.cursor() > cursor) out.push_back(event);
    }
    if (!out.empty() || changed_.WaitWithDeadline(&mu_, deadline)) return out;
  }
}

}  // namespace gradwire
