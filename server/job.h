// SPDX-License-Identifier: Apache-2.0
// One trainer job: its ranks, its handles and their operations, and the log
// that all of them are rebuilt from. docs/recovery.md.
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
#include "checkpoint/safetensors.h"
#include "gradwire/v1/jobs.pb.h"
#include "gradwire/v1/rank.pb.h"
#include "gradwire/v1/training.pb.h"
#include "server/checkpoint_catalogue.h"
#include "server/job_state.h"
#include "server/journal.h"
#include "server/metadata/metadata.h"
#include "server/metrics.h"
#include "server/names.h"
#include "server/op_queue.h"
#include "server/operation.h"
#include "server/rank_group.h"
#include "server/session_table.h"
#include "server/space_reserve.h"

namespace gradwire {

// What all jobs share; outlives them.
struct JobEnvironment {
  SessionTable* sessions = nullptr;
  Metrics* metrics = nullptr;
  std::string rank_binary;
  // As in RankGroupOptions.
  std::string device = "cpu";
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
  Metadata* metadata = nullptr;
  // The machine's, for a server with this lease.
  FileSystem* files = nullptr;
  SpaceReserve* reserve = nullptr;
  // Where checkpoint/fence.h finds who has it.
  std::string epoch_directory;
  // Of a job there lie in <jobs_directory>/<job>/: snapshots/<name>,
  // checkpoints/<name>, its op-log in log/, and in recovery/<number> the
  // checkpoints that its recovery begins with.
  std::string jobs_directory;
  // Most tensor data of a file of a base snapshot or a promoted model.
  int64_t snapshot_shard_bytes = kShardBytes;
  // Failures of ranks in a row, with no operation executed between them, after
  // which a job is not started again; 0: it fails with the first.
  int max_recoveries = 10;
  // A checkpoint for recovery is due after so many optimizer steps, or once so
  // much computing would have to be repeated.
  int64_t auto_checkpoint_steps = 100;
  double max_replay_seconds = 300;
  OpQueue::Limits queue;
  std::chrono::milliseconds retain_ttl = std::chrono::seconds(60);
  std::chrono::milliseconds result_retention = std::chrono::hours(1);
  std::atomic<bool> draining{false};
  // Told of every checkpoint and snapshot that was published.
  std::function<void(const CheckpointRef& ref)> on_saved =
      [](const CheckpointRef&) {};
  // Told of every change of a job's state; called with the job's mutex held.
  std::function<void(const v1::Job&)> on_change;

  CheckpointCatalogue catalogue() const {
    return CheckpointCatalogue(jobs_directory, *files, *metadata);
  }
};

// Thread rule: all methods from any thread.
class Job {
 public:
  Job(std::string job_id, const v1::JobSpec& spec, JobEnvironment* environment);
  // First one of these. A new job: its row, its log. Errors: those of Metadata
  // and Journal; nothing stays.
  absl::Status Create();
  // What an earlier process has left of it. What cannot be read makes a job
  // that has failed.
  void Restore(const JobRow& row);
  ~Job();
  Job(const Job&) = delete;

  const std::string& id() const { return id_; }
  const v1::JobSpec& spec() const { return spec_; }

  void Start();
  // Starts a failed job again, and rebuilds its state; handles are fenced.
  // Errors: FAILED_PRECONDITION JOB_NOT_FAILED, JOB_DELETED; UNAVAILABLE
  // SERVER_DRAINING; those of Metadata and Journal.
  absl::StatusOr<v1::Job> Restart();
  // Returns when no rank is left. Errors: those of Metadata; nothing has
  // changed then.
  absl::Status Delete();
  // Returns when the saves that run now, or were interrupted, have ended.
  // Errors: DEADLINE_EXCEEDED SAVES_RUNNING, after 45 minutes; CANCELLED, if
  // `given_up` says so; UNAVAILABLE SERVER_DRAINING.
  absl::Status AwaitSaves(const std::function<bool()>& given_up);
  // Ends the ranks, and the waiting for operations, which are in the log; the
  // job is of no use afterwards.
  void Stop();
  bool stopping() const;
  v1::Job Get() const;
  // Waits until the job has changed since `version` (0: at once) or `timeout`
  // is over; updates `version`.
  v1::Job WaitForChange(int64_t& version, absl::Duration timeout) const;
  // Errors: FAILED_PRECONDITION JOB_NOT_READY, JOB_FAILED, JOB_DELETED.
  absl::StatusOr<v1::Profile> GetProfile() const;
  // The profile of a job that was ready once, whatever has become of it.
  v1::Profile LastProfile() const;

  // Handles. See CreateModelRequest. `init_from.ref` is a path, as in
  // Checkpoint.path.
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
  // Reads arrays that are in the log alone. Errors: FAILED_PRECONDITION
  // RESULT_EXPIRED; those of Journal.
  absl::Status LoadItems(const OperationPtr& op);
  // Of an operation that is done; false if they are gone, or take more bytes.
  bool CopyItems(const OperationPtr& op, int64_t most,
                 v1::LogprobChunk* to) const;
  v1::CommitRecord ItemsCommit(const OperationPtr& op) const;
  v1::Operation Cancel(const OperationPtr& op);
  void Acknowledge(const OperationPtr& op);

  // The ranks that the job has now, for their streams; null while it has none,
  // or those it had are ending and others may come.
  std::shared_ptr<RankGroup> ranks() const;

  bool busy() const;
  bool ready() const;
  // Its weights have begun, with its base model or with a checkpoint: no
  // CreateModel initialises them any more.
  bool has_begun() const;

 private:
  struct Handle {
    int64_t number = 0;
    std::string model_id;
    std::string session_id;
    v1::CreateModelRequest request;
    OpQueue queue;
    bool attached = false;
    bool fenced = false;
    bool unloaded = false;
    // Drops what the handle before it has left; its end is the handle's
    // beginning.
    OperationPtr reset;
    int64_t closed_below = 0;
    // As Operation.durable_through_seq.
    int64_t durable_through = 0;
    Handle(const OpQueue::Limits& limits) : queue(limits) {}
  };
  struct Activation {
    std::string session_id;
    std::vector<DatumShape> shapes;
    std::vector<int> rank_of;
    Clock::time_point delivered;
    std::chrono::milliseconds ttl;
    int pins = 0;
    // The ranks have them, or will, and were sent no backward that uses them
    // up.
    bool kept = false;
  };
  // What the ranks have been sent and have not answered.
  struct Flight {
    enum Purpose {
      kOperation,
      kRelease,    // of activations
      kReplay,     // of `op`, which has ended
      kLoadPoint,  // `point`
      kSavePoint,  // `point`, which holds everything up to `op`
    };
    Purpose purpose = kOperation;
    int64_t id = 0;
    OperationPtr op = nullptr;
    RecoveryPoint point = {};
    // Logprobs of the run before, which come again.
    size_t known_items = 0;
    std::vector<v1::LogprobItem> items = {};  // of kReplay
    // Of kSavePoint: computed since the one before it, when it began.
    double seconds = 0;
    // Of a save that is written: of the state that is saved.
    int64_t optimizer_step = 0, weight_version = 0;
    // Whether its ranks write beside what follows.
    bool saves() const {
      return purpose == kSavePoint ||
             (purpose == kOperation && IsSave(op->kind));
    }
    bool SavesSnapshot() const {
      return purpose == kOperation &&
             op->kind == v1::OPERATION_KIND_SAVE_SNAPSHOT;
    }
  };
  // A save that goes on, beside what is in flight; if there is one.
  struct Save {
    // Its id is that of the ranks' writing, or 0 once they have answered it.
    std::optional<Flight> flight;
    // Set once they have: with what the save is to be ended.
    std::optional<v1::RankEndSave> end;
  };
  // What the executor is to send.
  struct Next {
    OperationRequest request;
    std::vector<DatumShape> shapes;
    std::vector<int> rank_of;
    int64_t id = 0;
    // The request is in the log.
    int64_t read_at = -1;
    bool load = false;  // the model
    // Of an operation that loads: where its checkpoint stays; and whether it is
    // there from the first time.
    std::string kept_at = {};
    bool replays = false;
  };
  // A checkpoint that is on the disk and nobody knows of yet; or only what the
  // log may let go.
  struct Reference {
    OperationPtr last;
    std::optional<RecoveryPoint> point = std::nullopt;
    bool usable = true;
  };
  enum class Stage { kStarting, kLoadPoint, kReplay, kRunning };

  int world_size() const { return std::max(1, spec_.world_size()); }
  std::string directory() const {
    return environment_->jobs_directory + "/" + id_;
  }
  std::string PointDirectory(const RecoveryPoint& point) const;
  // The rank of each datum; empty if there is one rank.
  std::vector<int> Assign(const std::vector<DatumShape>& shapes) const
      ABSL_LOCKS_EXCLUDED(mu_);
  // Makes the group and starts it. Nothing happens if the job is to end.
  void StartRanks() ABSL_LOCKS_EXCLUDED(mu_);

  // The executor: job_rank.cc.
  void Run();
  bool RestartRanks() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::optional<Next> TakeNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Next Begin(const OperationPtr& op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Next Launch(Flight flight) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A save runs beside what follows it: job_saves.cc.
  bool WaitsForSave(const OpQueue& queue) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool WaitsForSave(const Operation& op) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool IsSaving() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return state_save_.flight.has_value() || snapshot_save_.flight.has_value();
  }
  Save& SaveOf(const Flight& flight) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return flight.SavesSnapshot() ? snapshot_save_ : state_save_;
  }
  // Whether what the ranks have written may appear.
  bool MayEndSave(const Save& save) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether it was the answer to one.
  bool OnWritten(const v1::RankDone& done) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Next EndSave(Save& save) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropSaves() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether a save that has ended made this.
  bool HasSaved(const std::string& path, const std::string& digest) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether what is in the way of a save was made by it, before the end of the
  // process that would have said so: the name was free when it was accepted,
  // and the state is this one. Sets the result.
  bool FindSaved(const Flight& save, const v1::RankDone& done)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether one goes on that has killed a rank, and runs alone.
  bool SavesSuspect() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether one goes on that was interrupted before.
  bool SavesAgain() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What is loaded stays for as long as it may be loaded again, whatever
  // becomes of its name: job_loads.cc.
  std::string KeptAt(const Operation& op) const;
  // Makes the checkpoint stay, and the command load that.
  absl::Status KeepLoaded(const Next& next, v1::RankLoadState& load) const
      ABSL_LOCKS_EXCLUDED(mu_);
  // Directories of loads that may be run again.
  std::set<std::string> LoadsInUse() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<std::string> ListLoaded() const;
  absl::Status RemoveLoaded(const std::string& directory) const;
  // Of what has been listed before.
  void RemoveStrayLoads(const std::vector<std::string>& listed,
                        const std::set<std::string>& in_use) const;
  // Ends an operation that was not sent.
  void Refuse(int64_t id, const absl::Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  Dispatch LoadModel(int64_t id) const;
  void Send(Next next) ABSL_LOCKS_EXCLUDED(mu_);
  void Housekeep(Clock::time_point now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnRanks(GroupEvent event) ABSL_LOCKS_EXCLUDED(mu_);

  // What is said of the job: job.cc.
  void Apply(const JobEvent& event) ABSL_LOCKS_EXCLUDED(mu_);
  // Tells the log, the metrics and all who wait what the job's state is now.
  void Tell(bool was_ready) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Changed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Draining() const;
  // OK also while the job recovers: what is accepted waits.
  absl::Status Unready() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // What becomes of operations: job_results.cc.
  void OnLogprobs(GroupEvent& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnDone(const GroupEvent& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnOperationDone(const Flight& flight, const v1::RankDone& done)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailOperations() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Decides the end of an operation; it is told once it is in the log.
  void Finish(const OperationPtr& op, v1::OperationState state,
              const absl::Status& error) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Measure(const OperationPtr& op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // The log: job_journal.cc.
  absl::Status OpenJournal(const JobRow& row);
  // Puts it in its handle's queue, or returns the one that is there.
  absl::StatusOr<OperationPtr> Admit(const OperationPtr& op)
      ABSL_LOCKS_EXCLUDED(mu_);
  // Returns where its record is.
  absl::StatusOr<int64_t> Log(const OperationPtr& op);
  void Commit();
  void EndCommit() ABSL_LOCKS_EXCLUDED(mu_);
  // Until there is some; CANCELLED when the server stops.
  absl::Status AwaitSpace(const std::function<absl::Status()>& write)
      ABSL_LOCKS_EXCLUDED(mu_);
  // What it has saved is in the metadata, and known as made now.
  absl::Status RecordSaved(const Operation& op) ABSL_LOCKS_EXCLUDED(mu_);
  // Before the outcomes that have their bits.
  absl::Status RecordChoices(const std::vector<KernelChoicesRow>& choices)
      ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status Record(const std::vector<OperationPtr>& ended)
      ABSL_LOCKS_EXCLUDED(mu_);
  void CountDurable(Handle& handle) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // `recorded`: its outcome is in the log, durable if it must be.
  void Publish(const OperationPtr& op, bool recorded)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status AddReference(const Reference& reference)
      ABSL_LOCKS_EXCLUDED(mu_);
  // `from`, or what is needed before: to replay outcomes from `replay_from` on,
  // to run what has not ended, and for results.
  int64_t LogNeededFrom(int64_t from, int64_t replay_from) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void BreakJournal(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  // The job cannot go on.
  void Break(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RemoveDurableState();

  // After a restart of the server: job_restore.cc.
  absl::Status RestoreOperations(const JobRow& row)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RestoreHandle(const HandleRow& row) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Saves that had begun: what came after them has run.
  void RestoreSaves(
      const std::map<std::pair<int64_t, int64_t>, OperationPtr>& operations)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What the job's first handle began with.
  void RestoreBeginning() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::chrono::milliseconds RetainTtl(const Operation& op) const;
  void RestoreActivations() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Checkpoints that were published, but not referred to, before the end of
  // their ranks or of the server.
  absl::Status RemoveStrayPoints() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // After a failure of ranks: job_recovery.cc.
  void OnRanksFailed(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  bool MayRecover(const absl::Status& status) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TakeBackFlights(const absl::Status& status)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void BeginRecovery() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A save that was under way, and is of the state that `op` was run on.
  OperationPtr SaveBefore(const OperationPtr& op) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether it may begin beside what goes on.
  bool MayBeginBeside(const Operation& op) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::optional<Next> NextReplay() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Of one that has ended: whether the ranks were not as before.
  static bool ChangesState(const Operation& op);
  bool NeedsReplay(const OperationPtr& op) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnPointLoaded(const Flight& flight, const v1::RankDone& done)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnReplayed(const Flight& flight, const v1::RankDone& done)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool RecoveryEnded() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DescribeRecovery() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndRecovery() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // So that it does not have to begin at the beginning.
  bool PointDue(const OperationPtr& op) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Next SavePoint() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnPointSaved(const Flight& flight, const v1::RankDone& done)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  absl::Status CheckHandle(const Handle& handle, v1::OperationKind kind) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<Handle*> FindHandle(const std::string& model_id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Makes and logs a handle for a request that is new.
  absl::StatusOr<Handle*> Attach(const v1::CreateModelRequest& request)
      ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status CheckAttach(const v1::CreateModelRequest& request) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The first of the job's handles that has begun, or is about to; null: none.
  const Handle* FirstBegun() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AwaitInit() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What a handle would begin with.
  absl::Status CheckInit(const v1::CreateModelRequest& request) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Handle* FindAttached(const v1::CreateModelRequest& request) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What a handle begins with: without what the one before it has left, or, of
  // the first one, with the checkpoint that it names.
  OperationPtr ResetOf(const Handle& handle) const;
  static bool BeginsWithLoad(const Handle& handle);
  void Fence(Handle& handle, const absl::Status& error)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Drops the result of an operation whose time is over.
  void Expire(const OperationPtr& op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Those of expired operations that are neither run again nor still to be
  // written to the database. REQUIRES: !committing_.
  void DropShapes() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Release(const std::string& activation_id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Describe(const OperationPtr& op, v1::Operation& out) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::string id_;
  const v1::JobSpec spec_;
  JobEnvironment* const environment_;
  // One handle attaches at a time. Before mu_.
  absl::Mutex attach_mu_;
  // Set before the threads start, and by Restart while they idle; null if the
  // log is damaged.
  std::unique_ptr<Journal> journal_;

  mutable absl::Mutex mu_;
  // Signalled for the executor, for the committer, and for those who wait on
  // the job's state.
  absl::CondVar work_;
  absl::CondVar commit_work_;
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
  // What the metadata know of it, and of the profile.
  std::string known_ready_;
  // Of the ranks that are ready.
  std::string kernels_;
  // What ranks' kernels have decided, in order, and how many of these are on
  // the disk.
  std::vector<KernelChoicesRow> choices_;
  size_t choices_recorded_ = 0;

  std::map<std::string, std::unique_ptr<Handle>> handles_;
  Handle* current_ = nullptr;
  int64_t num_handles_ = 0;
  // Sent to the ranks before any other operation; no number of their own.
  std::deque<OperationPtr> control_;
  // Were under way when ranks failed; go before all others.
  std::deque<OperationPtr> again_;
  // Sent, in order.
  std::deque<Flight> in_flight_;
  // Of a checkpoint, which may be a recovery point; of a snapshot.
  Save state_save_, snapshot_save_;
  int64_t next_command_ = 1;
  std::map<std::string, Activation> activations_;
  // Ended operations with results, oldest first.
  std::deque<OperationPtr> results_;
  std::vector<OperationPtr> shapes_to_drop_;

  // Ended operations that the log does not know of yet, in order; checkpoints.
  std::deque<OperationPtr> ended_;
  // Those of them that are just being written to it.
  std::vector<OperationPtr> recording_;
  std::deque<Reference> references_;
  bool committing_ = false;
  bool end_commit_ = false;
  // The log takes nothing any more.
  bool journal_broken_ = false;
  // What the log has and the metadata do not.
  std::vector<OperationPtr> unreferenced_;
  int64_t referenced_at_ = 0;

  // What the ranks have run, in order, from history_from_ (an offset of the
  // log) on; of what came before, the state is in a point.
  std::deque<OperationPtr> history_;
  int64_t history_from_ = 0;
  std::vector<RecoveryPoint> points_;  // oldest first
  int64_t next_point_ = 1;             // no number is used twice

  Stage stage_ = Stage::kStarting;
  bool recovering_ = false;
  bool restart_due_ = false;
  Clock::time_point restart_at_;
  Clock::time_point recovery_began_, recovery_ended_;
  int failures_in_row_ = 0;
  // Why the job cannot go on, for the executor to say.
  absl::Status failure_;
  v1::Recovery recovery_;
  int64_t point_index_ = -1;  // that is loaded next; -1: the base model
  size_t replay_next_ = 0;    // of history_

  // Since the last point.
  int64_t steps_since_point_ = 0;
  double seconds_since_point_ = 0;
  Clock::time_point no_point_before_;
  // After this operation, and before any other.
  OperationPtr save_after_;

  std::thread executor_;
  std::thread committer_;
};

}  // namespace gradwire
