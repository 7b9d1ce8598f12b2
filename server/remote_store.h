// SPDX-License-Identifier: Apache-2.0
// Copies of checkpoints and snapshots in an object store: made in the
// background, fetched when there is none on the disk any more.
// docs/object_storage.md.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/remote/remote_checkpoints.h"
#include "gradwire/v1/checkpoints.pb.h"
#include "server/checkpoint_catalogue.h"
#include "server/metrics.h"

namespace gradwire {

// Thread rule: all methods from any thread.
class RemoteStore {
 public:
  // Begins at once: what earlier lives of this server have left, then what is
  // on the disk and not in the store. The others outlive it.
  RemoteStore(std::unique_ptr<ObjectStore> store, CheckpointCatalogue catalogue,
              FileSystem& files, Metadata* metadata, Metrics* metrics);
  ~RemoteStore() { End(); }
  // Cuts off what is being stored or fetched; the next server begins it again.
  // Requests fail from then on.
  void End();

  std::string url() const { return store_->url(); }

  // There is something new to store; it may have replaced what was stored.
  void Saved(const CheckpointRef& ref);
  // Where a copy is, or why there is none.
  void Fill(const CheckpointRef& ref, v1::Checkpoint& row) const;

  // Of one job, or of all: what the store has, by path.
  // Errors: those of RemoteCheckpoints.
  absl::StatusOr<std::vector<v1::Checkpoint>> List(const std::string& job_id);
  // Errors: also NOT_FOUND REMOTE_CHECKPOINT_NOT_FOUND.
  absl::StatusOr<v1::Checkpoint> Get(const CheckpointRef& ref);
  // Its names and place alone.
  v1::Checkpoint Name(const CheckpointRef& ref) const;
  // It is on the disk when this returns, with all that it needs.
  // Errors: those of RemoteCheckpoints::Fetch.
  absl::Status Fetch(const CheckpointRef& ref);
  // From the disk and from the store, be it in both or in one; not while
  // anything is fetched. Errors: those of CheckNoChild and of
  // CheckpointCatalogue::Delete.
  absl::StatusOr<v1::Checkpoint> Delete(const CheckpointRef& ref);
  // Of what will go from the disk: its copy goes as well, if need be after the
  // next start of the server. Errors: those of Metadata.
  absl::Status WillRemove(const CheckpointRef& ref, const std::string& digest);
  // Now it has: its copy goes in the background, however often it has to be
  // tried, and not before the last delta to it has gone from the store.
  // `digest`: what is to go; "": whatever is there.
  void RemoveLater(const CheckpointRef& ref, const std::string& digest);
  // FAILED_PRECONDITION SNAPSHOT_HAS_CHILDREN: the store has a delta to it.
  absl::Status CheckNoChild(const CheckpointRef& ref);

 private:
  void Wake();
  void Run();
  struct Removal {
    CheckpointRef ref;
    std::string digest;  // as in RemoveLater
  };
  // REQUIRES: mutex_ is held.
  void Add(const Removal& removal);
  // Of `path`, or of all.
  void TakeRemovals(const std::string& path);
  // ABORTED: something is being fetched.
  absl::Status RemoveOne(const Removal& removal);
  // REQUIRES: fetching_ is held.
  absl::Status RemoveCopy(const Removal& removal);
  void RemoveDue();
  void RunOnce();
  absl::Status Store(const CheckpointRef& ref);
  // What has been looked at. REQUIRES: storing_ is its path.
  absl::Status StoreOne(const CheckpointRef& ref, const v1::Checkpoint& row);
  absl::Status StoreFrom(const CheckpointRef& ref, const std::string& link,
                         v1::Checkpoint row);
  // False: it has been deleted meanwhile, or another one has its name.
  bool SetStored(const CheckpointRef& ref, const std::string& digest);
  std::string LinkOf(const CheckpointRef& ref) const;
  // Makes `link` the checkpoint, and `row` tell of it. False: it has no link,
  // for want of space as well.
  absl::StatusOr<bool> LinkIt(const CheckpointRef& ref, const std::string& link,
                              v1::Checkpoint& row) const;
  absl::Status FetchOne(const CheckpointRef& ref);
  void SetFailure(const CheckpointRef& ref, const absl::Status& status);
  bool ending() const;

  const std::unique_ptr<ObjectStore> store_;
  const CheckpointCatalogue catalogue_;
  FileSystem& files_;
  Metadata* const metadata_;
  RemoteCheckpoints remote_;
  Metrics* const metrics_;

  std::mutex fetching_;  // one at a time; before mutex_
  mutable std::mutex mutex_;
  std::condition_variable work_;
  bool end_ = false;
  bool woken_ = false;
  std::map<std::string, std::string> stored_;  // digests by path
  std::set<std::string> saved_;                // since it was looked at
  std::set<std::string> may_have_replaced_;    // the same
  // The path whose copy just goes, of which just one is made, or "": never the
  // same, for files of the one would go with those of the other.
  std::string removing_, storing_;
  std::map<std::string, absl::Status> failures_;
  std::deque<Removal> to_remove_, kept_for_child_;
  bool may_have_no_child_ = false;  // since it was looked at
  std::thread thread_;
};

}  // namespace gradwire
