// SPDX-License-Identifier: Apache-2.0
// In the background: what is stored, and what goes from the store. What
// requests ask for is in remote_requests.cc.
#include "server/remote_store.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/training_state.h"
#include "server/grpc_status.h"

namespace gradwire {
namespace {

// After a failure, and for what nobody has told of.
constexpr auto kPause = std::chrono::seconds(30);
// Of links to what is being stored, hidden, and known to RemoveLeftovers.
constexpr const char* kLinkEnd = "~storing.pending";
constexpr int kMostReplacements = 16;

absl::Status Replaced(const CheckpointRef& ref) {
  return ErrorBuilder(absl::StatusCode::kAborted, "CHECKPOINT_REPLACED")
      .With("checkpoint", ref.name)
      .Message(
          "another checkpoint has taken the place of this one while it was "
          "copied, or it was deleted; the copy begins again by itself");
}

}  // namespace

RemoteStore::RemoteStore(std::unique_ptr<ObjectStore> store,
                         CheckpointCatalogue catalogue, FileSystem& files,
                         Metadata* metadata, Metrics* metrics)
    : store_(std::move(store)),
      catalogue_(std::move(catalogue)),
      files_(files),
      metadata_(metadata),
      remote_(*store_, files_, metadata->server_id(), metadata->epoch()),
      metrics_(metrics) {
  metadata_->RememberReplaced();
  thread_ = std::thread([this] { Run(); });
}

void RemoteStore::End() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_ = true;
  }
  store_->Stop();
  work_.notify_all();
  if (thread_.joinable()) thread_.join();
}

bool RemoteStore::ending() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return end_;
}

void RemoteStore::Wake() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
  }
  work_.notify_all();
}

void RemoteStore::Saved(const CheckpointRef& ref) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.insert(ref.path());
    stored_.erase(ref.path());
    failures_.erase(ref.path());
    may_have_replaced_.insert(ref.path());
  }
  Wake();
}

void RemoteStore::Fill(const CheckpointRef& ref, v1::Checkpoint& row) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto stored = stored_.find(ref.path());
  if (stored != stored_.end() && stored->second == row.digest()) {
    row.set_object_url(url() + "/" + ref.path());
  }
  const auto failure = failures_.find(ref.path());
  if (failure != failures_.end()) {
    *row.mutable_upload_error() = ToOperationError(failure->second);
  }
}

void RemoteStore::Run() {
  TakeRemovals("");
  while (true) {
    RunOnce();
    std::unique_lock<std::mutex> lock(mutex_);
    const bool woken =
        work_.wait_for(lock, kPause, [this] { return end_ || woken_; });
    if (end_) return;
    woken_ = false;
    // Another server may have removed it.
    if (!woken) may_have_no_child_ = true;
  }
}

void RemoteStore::Add(const Removal& removal) {
  const bool known = std::any_of(
      to_remove_.begin(), to_remove_.end(), [&](const Removal& other) {
        return other.ref.path() == removal.ref.path() &&
               other.digest == removal.digest;
      });
  if (!known) to_remove_.push_back(removal);
}

void RemoteStore::TakeRemovals(const std::string& path) {
  const auto paths = metadata_->Removals();
  if (!paths.ok()) {
    spdlog::warn("copies to remove are not known: {}",
                 std::string(paths.status().message()));
    return;
  }
  for (const RemovalRow& row : *paths) {
    const auto ref = ParseCatalogueRef(row.path, "path");
    if (!ref.ok() || (!path.empty() && path != row.path)) continue;
    const std::lock_guard<std::mutex> lock(mutex_);
    Add({*ref, row.digest});
  }
}

absl::Status RemoteStore::RemoveOne(const Removal& removal) {
  const CheckpointRef& ref = removal.ref;
  const auto is_it = [&](const std::string& digest) {
    return removal.digest.empty() || removal.digest == digest;
  };
  const auto commit = remote_.Find(ref.path());
  // One that is damaged goes.
  if (!commit.ok() && !absl::IsDataLoss(commit.status())) {
    return commit.status();
  }
  // Another one has taken its name since.
  if (commit.ok() && commit->has_value() && !is_it((*commit)->digest)) {
    return metadata_->EndRemoval({ref.path(), removal.digest});
  }
  const absl::Status alone = CheckNoChild(ref);
  // What is not on the disk must not come back before it has gone; and who
  // fetches something else may do so for long.
  const std::unique_lock<std::mutex> fetching(fetching_, std::try_to_lock);
  if (!fetching.owns_lock()) return absl::AbortedError("");
  const auto there = catalogue_.Get(ref);
  // It was to go from the disk, and has not, or has come back; it may be
  // damaged there.
  if (absl::IsDataLoss(there.status()) ||
      (there.ok() && is_it(there->digest()))) {
    return metadata_->EndRemoval({ref.path(), removal.digest});
  }
  // Of a disk that fails nobody knows what has gone from it.
  if (!there.ok() && !absl::IsNotFound(there.status())) return there.status();
  // What has its name will take its place in the store, unless it is another
  // server's.
  if (there.ok() && !ref.snapshot && commit.ok() && commit->has_value()) {
    return remote_.IsOwn(**commit)
               ? absl::AbortedError("")
               : metadata_->EndRemoval({ref.path(), removal.digest});
  }
  GW_RETURN_IF_ERROR(alone);
  return RemoveCopy(removal);
}

void RemoteStore::RemoveDue() {
  std::set<std::string> replaced;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    replaced.swap(may_have_replaced_);
  }
  for (const std::string& path : replaced) TakeRemovals(path);
  std::deque<Removal> removals;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    removals.swap(to_remove_);
    if (may_have_no_child_) {
      for (Removal& kept : kept_for_child_) removals.push_back(std::move(kept));
      kept_for_child_.clear();
    }
    may_have_no_child_ = false;
  }
  bool away = false;
  for (const Removal& removal : removals) {
    const absl::Status status =
        away ? absl::UnavailableError("") : RemoveOne(removal);
    if (status.ok()) continue;
    const auto detail = GetErrorDetail(status);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (detail && detail->reason == "SNAPSHOT_HAS_CHILDREN") {
      kept_for_child_.push_back(removal);
      continue;
    }
    Add(removal);
    // It would say so of each.
    if (away || absl::IsAborted(status)) continue;
    away = absl::IsUnavailable(status);
    spdlog::warn("{} is not removed from {}: {}", removal.ref.path(), url(),
                 std::string(status.message()));
  }
}

void RemoteStore::RunOnce() {
  RemoveDue();
  auto refs = catalogue_.Refs();
  if (!refs.ok()) {
    spdlog::warn("checkpoints to store cannot be listed: {}",
                 std::string(refs.status().message()));
    return;
  }
  int64_t waiting = 0;
  const auto is_stored = [this](const CheckpointRef& ref) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stored_.count(ref.path()) != 0;
  };
  for (const CheckpointRef& ref : *refs) waiting += is_stored(ref) ? 0 : 1;
  metrics_->SetUploadsWaiting(waiting);
  for (const CheckpointRef& ref : *refs) {
    if (ending()) return;
    if (is_stored(ref)) continue;
    const absl::Status status = Store(ref);
    if (ending()) return;
    SetFailure(ref, status);
    metrics_->CountUpload(status.ok() ? "ok" : "error");
    if (status.ok()) metrics_->SetUploadsWaiting(--waiting);
    // It would say so of each.
    if (absl::IsUnavailable(status)) break;
  }
}

void RemoteStore::SetFailure(const CheckpointRef& ref,
                             const absl::Status& status) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (status.ok()) {
    failures_.erase(ref.path());
    return;
  }
  const auto [failure, is_new] = failures_.emplace(ref.path(), status);
  // Once for each reason.
  if (is_new || failure->second != status) {
    spdlog::warn("{} is not in {} yet: {}", ref.path(), url(),
                 std::string(status.message()));
  }
  failure->second = status;
}

absl::Status RemoteStore::Store(const CheckpointRef& ref) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.erase(ref.path());
  }
  auto row = catalogue_.Get(ref);
  if (absl::IsNotFound(row.status())) return absl::OkStatus();
  // What is damaged is not copied.
  GW_RETURN_IF_ERROR(row.status());
  if (!row->parent().empty()) {
    const CheckpointRef parent = {ref.job_id, row->parent(), true};
    bool is_stored = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_stored = stored_.count(parent.path()) != 0;
    }
    // A delta is seen only with the whole chain.
    if (!is_stored) GW_RETURN_IF_ERROR(Store(parent));
  }
  {
    std::unique_lock<std::mutex> lock(mutex_);
    work_.wait(lock, [&] { return end_ || removing_ != ref.path(); });
    storing_ = ref.path();
  }
  const absl::Status stored = StoreOne(ref, *row);
  const std::lock_guard<std::mutex> lock(mutex_);
  storing_.clear();
  return stored;
}

absl::Status RemoteStore::StoreOne(const CheckpointRef& ref,
                                   const v1::Checkpoint& row) {
  GW_ASSIGN_OR_RETURN(const auto there, remote_.Find(ref.path()));
  if (there.has_value() && there->digest == row.digest()) {
    SetStored(ref, there->digest);
    return absl::OkStatus();
  }
  GW_RETURN_IF_ERROR(remote_.Sweep(ref.path()));
  const std::string link = LinkOf(ref);
  const absl::Status stored = StoreFrom(ref, link, row);
  // What stays, the next server removes.
  (void)RemoveIfThere(files_, link);
  return stored;
}

std::string RemoteStore::LinkOf(const CheckpointRef& ref) const {
  return gradwire::DirectoryOf(catalogue_.DirectoryOf(ref)) + "/." + ref.name +
         kLinkEnd;
}

bool RemoteStore::SetStored(const CheckpointRef& ref,
                            const std::string& digest) {
  // Who deletes it removes the copy after it is gone from the disk: before
  // this, and then there was none yet, or after it.
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto now = catalogue_.Get(ref);
  // What has taken its name is to be stored yet.
  const bool is_latest = now.ok() && now->digest() == digest;
  if (is_latest && saved_.count(ref.path()) == 0) stored_[ref.path()] = digest;
  return is_latest || !(now.ok() || absl::IsNotFound(now.status()));
}

absl::StatusOr<bool> RemoteStore::LinkIt(const CheckpointRef& ref,
                                         const std::string& link,
                                         v1::Checkpoint& row) const {
  // Snapshots are never replaced.
  if (ref.snapshot) return false;
  const std::string directory = catalogue_.DirectoryOf(ref);
  for (int i = 0; i < kMostReplacements; ++i) {
    GW_RETURN_IF_ERROR(RemoveIfThere(files_, link));
    const auto linked = LinkState(files_, directory, link);
    if (absl::IsResourceExhausted(linked.status())) return false;
    GW_RETURN_IF_ERROR(linked.status());
    if (!*linked) return false;
    GW_ASSIGN_OR_RETURN(const auto reader, StateReader::Open(files_, link));
    if (reader->summary().digest == row.digest()) return true;
    // It was replaced since it was looked at.
    GW_ASSIGN_OR_RETURN(row, catalogue_.Get(ref));
  }
  return Replaced(ref);
}

absl::Status RemoteStore::StoreFrom(const CheckpointRef& ref,
                                    const std::string& link,
                                    v1::Checkpoint row) {
  // A copy is of one checkpoint, though another may take its name before all of
  // it is there; then that one comes next.
  const absl::StatusOr<bool> linked = LinkIt(ref, link, row);
  if (absl::IsNotFound(linked.status())) return absl::OkStatus();  // deleted
  GW_RETURN_IF_ERROR(linked.status());
  RemoteCheckpoints::Source source;
  source.directory = *linked ? link : catalogue_.DirectoryOf(ref);
  source.digest = row.digest();
  source.parent = row.parent();
  source.created_micros = row.create_time().seconds() * 1'000'000 +
                          row.create_time().nanos() / 1000;
  source.replaces = !ref.snapshot;
  source.check = [&]() -> absl::Status {
    if (*linked) return absl::OkStatus();
    const auto now = catalogue_.Get(ref);
    if (now.ok() && now->digest() == row.digest()) return absl::OkStatus();
    return Replaced(ref);
  };
  GW_ASSIGN_OR_RETURN(const RemoteCommit commit,
                      remote_.Store(ref.path(), source));
  if (!SetStored(ref, commit.digest)) {
    const absl::Status noted = WillRemove(ref, commit.digest);
    RemoveLater(ref, commit.digest);
    return noted;
  }
  metrics_->CountUploadBytes(commit.bytes());
  spdlog::info("{} is in {}, {} MiB", ref.path(), url(), commit.bytes() >> 20);
  return absl::OkStatus();
}

}  // namespace gradwire
