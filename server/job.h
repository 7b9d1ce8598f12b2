// SPDX-License-Identifier: Apache-2.0
// One trainer job: its rank, its handles and their operations.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
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
#include "server/rank_process.h"
#include "server/session_table.h"

namespace gradwire {

// What all jobs share; outlives them.
struct JobEnvironment {
  SessionTable* sessions = nullptr;
  Metrics* metrics = nullptr;
  std::string rank_binary;
  // Where ranks dial: "unix:...".
  std::string rank_address;
  // Default of JobSpec.threads; 0 = all cores.
  int threads = 0;
  // Snapshots of a job lie in <jobs_directory>/<job>/snapshots/<name>.
  std::string jobs_directory;
  OpQueue::Limits queue;
  std::chrono::milliseconds retain_ttl = std::chrono::seconds(60);
  std::chrono::milliseconds result_retention = std::chrono::hours(1);
  std::atomic<bool> draining{false};
  // Told of every change of a job's state; called with the job's mutex held.
  std::function<void(const v1::Job&)> on_change;
};

// Sends commands to the connected rank. Write blocks; false: the stream is
// broken.
class RankStream {
 public:
  virtual ~RankStream() = default;
  virtual bool Write(const v1::RankCommand& command) = 0;
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
  // Returns when no process is left.
  void Delete();
  // Ends the rank and what waits; the job is of no use afterwards.
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

  // The rank's side. Connect: false if the token is not this rank's, or one is
  // connected.
  bool Connect(const std::string& token, int64_t pid, RankStream* stream);
  void OnRankEvent(const v1::RankEvent& event);
  void Disconnect();

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
    Clock::time_point delivered;
    std::chrono::milliseconds ttl;
    int pins = 0;
  };

  void Run();
  void Send(std::vector<v1::RankCommand> commands);
  std::vector<v1::RankCommand> Begin(const OperationPtr& op)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Housekeep(Clock::time_point now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Apply(const JobEvent& event) ABSL_LOCKS_EXCLUDED(mu_);
  void Changed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailOperations() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Finish(const OperationPtr& op, v1::OperationState state,
              const absl::Status& error) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnLogprobs(const v1::RankLogprobs& logprobs)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnDone(const v1::RankDone& done) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Measure(const OperationPtr& op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
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
  const std::string token_;
  const Clock::time_point created_;

  mutable absl::Mutex mu_;
  // Signalled for the executor, and for those who wait on the job's state.
  absl::CondVar work_;
  mutable absl::CondVar state_changed_;
  bool stopping_ = false;
  int64_t version_ = 1;
  v1::Job job_;
  v1::Profile profile_;

  bool connected_ = false;
  bool load_sent_ = false;
  std::unique_ptr<RankProcess> process_;
  bool process_ended_ = false;

  std::map<std::string, std::unique_ptr<Handle>> handles_;
  Handle* current_ = nullptr;
  int64_t num_handles_ = 0;
  std::map<std::pair<std::string, int64_t>, v1::CreateModelResponse>
      created_models_;
  std::set<std::pair<std::string, int64_t>> creating_;
  // Sent to the rank before any other operation; no number of their own.
  std::deque<OperationPtr> control_;
  // Sent, in order.
  std::deque<std::pair<int64_t, OperationPtr>> in_flight_;
  int64_t next_command_ = 1;
  std::map<std::string, Activation> activations_;
  // Ended operations with results, oldest first.
  std::deque<OperationPtr> results_;

  // Held while writing; the stream is null when no rank is connected.
  absl::Mutex write_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  RankStream* stream_ ABSL_GUARDED_BY(write_mu_) = nullptr;

  std::thread executor_;
};

}  // namespace gradwire
