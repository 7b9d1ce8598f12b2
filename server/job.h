// SPDX-License-Identifier: Apache-2.0
// One trainer job: its ranks, its handles and their operations.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "gradwire/v1/jobs.pb.h"
#include "gradwire/v1/rank.pb.h"
#include "gradwire/v1/training.pb.h"
#include "server/job_state.h"
#include "server/metrics.h"
#include "server/op_queue.h"
#include "server/operation.h"
#include "server/rank_group.h"
#include "server/session_table.h"

namespace gradwire {

// What all jobs share; outlives them.
struct JobEnvironment {
  SessionTable* sessions = nullptr;
  Metrics* metrics = nullptr;
  std::string rank_binary;
  // Ranks are started by somebody else, and know this token.
  bool external = false;
  std::string join_token;
  // Where ranks dial: "unix:...".
  std::string rank_address;
  // Default of JobSpec.threads; 0 = an equal share of the cores.
  int threads = 0;
  // A rank that is silent for so long is hung.
  absl::Duration rank_timeout = absl::Seconds(30);
  // How long ranks wait for each other in one collective.
  absl::Duration collective_timeout = absl::Seconds(120);
  // Snapshots of a job lie in <jobs_directory>/<job>/snapshots/<name>.
  std::string jobs_directory;
  OpQueue::Limits queue;
  std::chrono::milliseconds retain_ttl = std::chrono::seconds(60);
  std::chrono::milliseconds result_retention = std::chrono::hours(1);
  std::atomic<bool> draining{false};
  // Told of every change of a job's state; called with the job's mutex held.
  std::function<void(const v1::Job&)> on_change;
};

// Thread rule: all methods from any thread.
class Job {
 public:
  Job(std::string job_id, const v1::JobSpec& spec, JobEnvironment* environment);
  ~Job();
  Job(const Job&) = delete;

  const std::string& id() const { return id_; }
  const v1::JobSpec& spec() const { return spec_; }

  void Start();
  // Starts a failed job again, from its base model: weights are lost, handles
  // fenced. Errors: FAILED_PRECONDITION JOB_NOT_FAILED, JOB_DELETED;
  // UNAVAILABLE SERVER_DRAINING.
  absl::StatusOr<v1::Job> Restart();
  // Returns when no rank is left.
  void Delete();
  // Ends the ranks and what waits; the job is of no use afterwards.
  void Stop();
  v1::Job Get() const;
  // Waits until the job has changed since `version` (0: at once) or `timeout`
  // is over; updates `version`.
  v1::Job WaitForChange(int64_t& version, absl::Duration timeout) const;
  // Errors: FAILED_PRECONDITION JOB_NOT_READY, JOB_FAILED, JOB_DELETED.
  absl::StatusOr<v1::Profile> GetProfile() const;
  // The profile of a job that was ready once, whatever has become of it.
  v1::Profile LastProfile() const;

  // Handles. See CreateModelRequest.
  absl::StatusOr<v1::CreateModelResponse> CreateModel(
      const v1::CreateModelRequest& request);
  absl::StatusOr<v1::ModelInfo> GetModelInfo(const std::string& model_id) const;

  // Whether the handle could take an operation of this kind now: what can be
  // said before a batch has been received. Errors: those of OpQueue::CheckSeq;
  // NOT_FOUND MODEL_NOT_FOUND; FAILED_PRECONDITION HANDLE_FENCED,
  // MODEL_UNLOADED, MODEL_FORWARD_ONLY, JOB_FAILED, JOB_DELETED; UNAVAILABLE
  // SERVER_DRAINING.
  absl::Status CheckSubmit(const std::string& model_id, int64_t seq,
                           v1::OperationKind kind) const;
  // Queues an operation, or returns the earlier one with this number and
  // digest. `activation_id` as Operation's.
  absl::StatusOr<OperationPtr> Submit(const std::string& model_id, int64_t seq,
                                      v1::OperationKind kind,
                                      OperationRequest request,
                                      const std::string& activation_id,
                                      double retain_ttl_seconds = 0,
                                      std::vector<DatumShape> shapes = {});
  // Ends a number without running anything: as CANCELLED if `status` is of that
  // code, else as FAILED. Nothing happens if the number is in use or closed.
  void EndSeq(const std::string& model_id, int64_t seq, v1::OperationKind kind,
              const absl::Status& status);
  // While held, the number's gap does not time out, and activations stay.
  void Hold(const std::string& model_id, int64_t seq,
            const std::string& activation_id);
  void Unhold(const std::string& model_id, int64_t seq,
              const std::string& activation_id);
  // Shapes of the datums behind an id. Errors: NOT_FOUND ACTIVATIONS_EXPIRED.
  absl::StatusOr<std::vector<DatumShape>> ActivationShapes(
      const std::string& model_id, const std::string& activation_id) const;

  // Frees what an id keeps, outside of the sequence.
  void DropActivations(const std::string& activation_id);

  OperationPtr FindOperation(const std::string& model_id, int64_t seq) const;
  v1::Operation Describe(const OperationPtr& op) const;
  // Waits until the operation has ended or `timeout` is over.
  v1::Operation Wait(const OperationPtr& op, absl::Duration timeout) const;
  // Items from `from` on; waits up to `timeout` for one, or for the end.
  struct Items {
    std::vector<v1::LogprobItem> items;
    bool final = false;
    bool expired = false;
  };
  Items ReadItems(const OperationPtr& op, size_t from,
                  absl::Duration timeout) const;
  v1::CommitRecord ItemsCommit(const OperationPtr& op) const;
  v1::Operation Cancel(const OperationPtr& op);
  void Acknowledge(const OperationPtr& op);

  // The ranks that the job has now, for their streams.
  std::shared_ptr<RankGroup> ranks() const;

  bool busy() const;
  bool ready() const;

 private:
  struct Handle {
    std::string model_id;
    std::string session_id;
    v1::CreateModelRequest request;
    OpQueue queue;
    bool fenced = false;
    bool unloaded = false;
    Handle(const OpQueue::Limits& limits) : queue(limits) {}
  };
  struct Activation {
    std::string session_id;
    std::vector<DatumShape> shapes;
    std::vector<int> rank_of;
    Clock::time_point delivered;
    std::chrono::milliseconds ttl;
    int pins = 0;
  };

  int world_size() const { return std::max(1, spec_.world_size()); }
  // The rank of each datum; empty if there is one rank.
  std::vector<int> Assign(const std::vector<DatumShape>& shapes) const
      ABSL_LOCKS_EXCLUDED(mu_);
  // Makes the group and starts it. Nothing happens if the job is to end.
  void StartRanks() ABSL_LOCKS_EXCLUDED(mu_);
  void Run();
  Dispatch Load() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Dispatch Begin(const OperationPtr& op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What is sent next, or nothing.
  std::optional<Dispatch> NextDispatch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Housekeep(Clock::time_point now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Apply(const JobEvent& event) ABSL_LOCKS_EXCLUDED(mu_);
  // Tells the log, the metrics and all who wait what the job's state is now.
  void Tell(bool was_ready) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Changed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailOperations() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Finish(const OperationPtr& op, v1::OperationState state,
              const absl::Status& error) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnRanks(GroupEvent event) ABSL_LOCKS_EXCLUDED(mu_);
  void OnLogprobs(GroupEvent& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnDone(const GroupEvent& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Measure(const OperationPtr& op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Draining() const;
  absl::Status Unready() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckHandle(const Handle& handle, v1::OperationKind kind) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<Handle*> FindHandle(const std::string& model_id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Fence(Handle& handle, const absl::Status& error)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Drops the result of an operation whose time is over.
  void Expire(Operation& op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Release(const std::string& activation_id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Describe(const OperationPtr& op, v1::Operation& out) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::string id_;
  const v1::JobSpec spec_;
  JobEnvironment* const environment_;

  mutable absl::Mutex mu_;
  // Signalled for the executor, and for those who wait on the job's state.
  absl::CondVar work_;
  mutable absl::CondVar state_changed_;
  bool stopping_ = false;
  int64_t version_ = 1;
  Clock::time_point started_;
  v1::Job job_;
  v1::Profile profile_;

  // Its methods are called without mu_.
  std::shared_ptr<RankGroup> ranks_;
  // No rank is left, or none has been started.
  bool ranks_ended_ = true;
  // All ranks are there, and wait to be told what to load.
  bool load_due_ = false;
  // Of AssignRanks; rank 0's word.
  double quadratic_ = 0;

  std::map<std::string, std::unique_ptr<Handle>> handles_;
  Handle* current_ = nullptr;
  int64_t num_handles_ = 0;
  std::map<std::pair<std::string, int64_t>, v1::CreateModelResponse>
      created_models_;
  std::set<std::pair<std::string, int64_t>> creating_;
  // Sent to the ranks before any other operation; no number of their own.
  std::deque<OperationPtr> control_;
  // Sent, in order.
  std::deque<std::pair<int64_t, OperationPtr>> in_flight_;
  int64_t next_command_ = 1;
  std::map<std::string, Activation> activations_;
  // Ended operations with results, oldest first.
  std::deque<OperationPtr> results_;

  std::thread executor_;
};

}  // namespace gradwire
