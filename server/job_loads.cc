// SPDX-License-Identifier: Apache-2.0
// A load that is run again, after the end of a rank or of the server, loads
// what it loaded the first time: by then its name may stand for another
// checkpoint, or for none. So its files get a second place before they are
// read, in <jobs_directory>/<job>/loaded/<handle>-<number>/<name>, as links,
// which take no space. docs/recovery.md.
#include <algorithm>

#include "base/log.h"
#include "base/status.h"
#include "checkpoint/training_state.h"
#include "server/job.h"

namespace gradwire {

std::string Job::KeptAt(const Operation& op) const {
  return directory() + "/loaded/" + std::to_string(op.handle) + "-" +
         std::to_string(op.seq);
}

absl::Status Job::KeepLoaded(const Next& next, v1::RankLoadState& load) const {
  FileSystem& files = *environment_->files;
  const std::string& from = load.directory();
  const std::string kept = next.kept_at + from.substr(from.find_last_of('/'));
  if (next.replays) {
    // Absent: on a file system without links, or by an older version.
    if (files.Stat(kept).ok()) load.set_directory(kept);
    return absl::OkStatus();
  }
  const absl::StatusOr<bool> linked = LinkState(files, from, kept);
  // Of what is not there, the ranks say so.
  if (absl::IsNotFound(linked.status())) return absl::OkStatus();
  GW_RETURN_IF_ERROR(linked.status());
  if (*linked) {
    load.set_directory(kept);
  } else {
    spdlog::warn(
        "job {}: {} cannot be linked, and must stay until the next checkpoint "
        "for recovery is there",
        id_, load.path());
  }
  return absl::OkStatus();
}

void Job::Refuse(int64_t id, const absl::Status& status) {
  absl::MutexLock lock(&mu_);
  const auto found =
      std::find_if(in_flight_.begin(), in_flight_.end(),
                   [&](const Flight& flight) { return flight.id == id; });
  // Ranks that have failed since have given it back: it comes again.
  if (found == in_flight_.end()) return;
  const OperationPtr op = found->op;
  in_flight_.erase(found);
  if (save_after_ == op) save_after_ = nullptr;
  Finish(op, v1::OPERATION_STATE_FAILED, status);
  work_.SignalAll();
}

std::set<std::string> Job::LoadsInUse() const {
  std::set<std::string> in_use;
  const auto add = [&](const Operation& op) {
    if (op.loads) in_use.insert(KeptAt(op));
  };
  for (const OperationPtr& op : history_) add(*op);
  for (const auto& [id, handle] : handles_) {
    handle->queue.Visit([&](const Operation& op) {
      if (!op.Final()) add(op);
    });
    if (handle->reset != nullptr && !handle->reset->Final()) {
      add(*handle->reset);
    }
  }
  return in_use;
}

std::vector<std::string> Job::ListLoaded() const {
  const std::string parent = directory() + "/loaded";
  auto names = environment_->files->List(parent);
  if (!names.ok()) return {};
  for (std::string& name : *names) name = parent + "/" + name;
  return *std::move(names);
}

absl::Status Job::RemoveLoaded(const std::string& directory) const {
  FileSystem& files = *environment_->files;
  const auto names = files.List(directory);
  if (absl::IsNotFound(names.status())) return absl::OkStatus();
  GW_RETURN_IF_ERROR(names.status());
  for (const std::string& name : *names) {
    GW_RETURN_IF_ERROR(RemoveIfThere(files, directory + "/" + name));
  }
  return files.Remove(directory);
}

void Job::RemoveStrayLoads(const std::vector<std::string>& listed,
                           const std::set<std::string>& in_use) const {
  for (const std::string& each : listed) {
    if (in_use.count(each) > 0) continue;
    const absl::Status removed = RemoveLoaded(each);
    // It goes with the next checkpoint.
    if (!removed.ok()) {
      spdlog::warn("job {}: {}", id_, std::string(removed.message()));
    }
  }
}

}  // namespace gradwire
