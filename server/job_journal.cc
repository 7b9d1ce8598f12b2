// SPDX-License-Identifier: Apache-2.0
// What of a job is on the disk, and when: operations before they run, what
// became of them before anybody is told. docs/recovery.md.
#include "base/log.h"
#include "base/status.h"
#include "google/protobuf/util/time_util.h"
#include "server/failpoint.h"
#include "server/job.h"
#include "server/journal_records.h"

namespace gradwire {
namespace {

// How long a full disk is waited for, before it is tried again.
constexpr absl::Duration kFullPause = absl::Milliseconds(200);
// And until then; a disk that is full for longer fails the job.
constexpr absl::Duration kFullPatience = absl::Minutes(30);
// More of one operation's arrays are not kept in the log: a record has its
// limit, and so has a message.
constexpr int64_t kMostArrayBytes = int64_t{1} << 30;

// What a client may build on must be there after a power loss. Of other results
// it keeps the inputs until an operation of these says that they are.
bool MustBeDurable(const Operation& op) {
  if (op.final_state != v1::OPERATION_STATE_DONE) return true;
  return op.kind != v1::OPERATION_KIND_FORWARD &&
         op.kind != v1::OPERATION_KIND_FORWARD_BACKWARD &&
         op.kind != v1::OPERATION_KIND_BACKWARD &&
         op.kind != v1::OPERATION_KIND_ZERO_GRAD &&
         op.kind != v1::OPERATION_KIND_RELEASE_ACTIVATIONS;
}

}  // namespace

absl::Status Job::OpenJournal(const JobRow& row) {
  GW_ASSIGN_OR_RETURN(
      journal_, Journal::Open(*environment_->files, environment_->metadata, row,
                              directory() + "/log"));
  return absl::OkStatus();
}

// ---- Before an operation is answered ----------

absl::StatusOr<int64_t> Job::Log(const OperationPtr& op) {
  v1::JournalOp record;
  record.set_kind(op->kind);
  record.set_activation_id(op->activation_id);
  record.set_retain_ttl_seconds(op->retain_ttl_seconds);
  record.set_request_digest(op->digest);
  record.set_datum_count(op->request.datum_count);
  record.set_tokens(op->tokens);
  record.set_bytes(op->bytes);
  for (const DatumShape& shape : op->shapes) {
    record.add_shape_n(shape.n);
    record.add_shape_k(shape.k);
  }
  record.mutable_rank_of()->Add(op->rank_of.begin(), op->rank_of.end());
  *record.mutable_create_time() = op->record.create_time();
  if (op->request.command.has_save_state()) {
    const auto there =
        environment_->files->Stat(op->request.command.save_state().directory());
    op->name_taken = !absl::IsNotFound(there.status());
    record.set_name_taken(op->name_taken);
  }
  // Lent, not copied: a batch is large.
  OperationRequest& request = op->request;
  record.mutable_command()->Swap(&request.command);
  for (v1::DatumChunk& chunk : request.datums) {
    record.add_datums()->Swap(&chunk);
  }
  for (v1::GradientChunk& chunk : request.gradients) {
    record.add_gradients()->Swap(&chunk);
  }
  auto range = journal_->AppendOp(op->handle, op->seq, record);
  request.command.Swap(record.mutable_command());
  for (size_t i = 0; i < request.datums.size(); ++i) {
    request.datums[i].Swap(record.mutable_datums(static_cast<int>(i)));
  }
  for (size_t i = 0; i < request.gradients.size(); ++i) {
    request.gradients[i].Swap(record.mutable_gradients(static_cast<int>(i)));
  }
  GW_RETURN_IF_ERROR(range.status());
  return range->begin;
}

// ---- Before its end is told ----------

void Job::Commit() {
  mu_.Lock();
  while (true) {
    if (ended_.empty() && references_.empty()) {
      if (end_commit_) break;
      commit_work_.Wait(&mu_);
      continue;
    }
    const std::vector<OperationPtr> ended(ended_.begin(), ended_.end());
    const std::vector<Reference> references(references_.begin(),
                                            references_.end());
    const std::vector<KernelChoicesRow> choices(
        choices_.begin() + static_cast<int64_t>(choices_recorded_),
        choices_.end());
    ended_.clear();
    references_.clear();
    recording_ = ended;
    committing_ = true;
    const bool broken = journal_broken_ || journal_ == nullptr;
    mu_.Unlock();
    absl::Status status;
    if (!broken && !ended.empty()) {
      status = RecordChoices(choices);
      if (status.ok()) status = Record(ended);
    }
    if (!status.ok() && !absl::IsCancelled(status)) BreakJournal(status);
    if (!absl::IsCancelled(status)) {
      absl::MutexLock lock(&mu_);
      const bool recorded = status.ok() && !broken;
      if (recorded && !ended.empty()) choices_recorded_ += choices.size();
      for (const OperationPtr& op : ended) Publish(op, recorded);
      recording_.clear();
      work_.SignalAll();
    }
    for (const OperationPtr& op : ended) {
      // One of which nobody knows may be run again. What stays goes with the
      // next checkpoint.
      const bool known = status.ok() && !broken;
      if (known && op->loads && op->final_state != v1::OPERATION_STATE_DONE) {
        RemoveLoaded(KeptAt(*op)).IgnoreError();
      }
    }
    Failpoint("op.after_reply");
    for (const Reference& reference : references) {
      if (broken || !status.ok()) break;
      if (absl::Status added = AddReference(reference); !added.ok()) {
        // The log goes on, and grows until the next one.
        spdlog::warn("job {}: its log cannot be shortened: {}", id_,
                     std::string(added.message()));
      }
    }
    mu_.Lock();
    committing_ = false;
    work_.SignalAll();
  }
  mu_.Unlock();
}

absl::Status Job::AwaitSpace(const std::function<absl::Status()>& write) {
  const absl::Time deadline = absl::Now() + kFullPatience;
  bool told = false;
  while (true) {
    const absl::Status status = write();
    if (!absl::IsResourceExhausted(status) || absl::Now() > deadline) {
      return status;
    }
    // What has been done comes before what may come.
    if (environment_->reserve->Release()) continue;
    // The next server runs what is not recorded again.
    if (stopping()) return absl::CancelledError("the server stops");
    if (!told) {
      spdlog::warn("job {}: results wait for space on the disk: {}", id_,
                   std::string(status.message()));
    }
    told = true;
    absl::SleepFor(kFullPause);
  }
}

absl::Status Job::RecordSaved(const Operation& op) {
  std::string saved;
  if (op.record.has_save_state()) saved = op.record.save_state().path();
  if (op.record.has_snapshot()) saved = op.record.snapshot().path();
  const auto ref = ParseCatalogueRef(saved, "path");
  if (!ref.ok()) return absl::OkStatus();
  const absl::Status known = AwaitSpace([&] {
    return environment_->catalogue().Saved(
        *ref, op.is_again,
        google::protobuf::util::TimeUtil::TimestampToMicroseconds(
            op.record.create_time()));
  });
  if (absl::IsFailedPrecondition(known) || absl::IsCancelled(known)) {
    return known;  // fenced, or the server stops
  }
  // What its files say goes then, until the collector makes up for it.
  if (!known.ok()) {
    spdlog::warn("job {}: {} is not in the metadata: {}", id_, saved,
                 std::string(known.message()));
  }
  return absl::OkStatus();
}

absl::Status Job::RecordChoices(const std::vector<KernelChoicesRow>& choices) {
  if (choices.empty()) return absl::OkStatus();
  return AwaitSpace(
      [&] { return environment_->metadata->AddChoices(id_, choices); });
}

absl::Status Job::Record(const std::vector<OperationPtr>& ended) {
  bool durable = false;
  for (const OperationPtr& op : ended) GW_RETURN_IF_ERROR(RecordSaved(*op));
  for (const OperationPtr& op : ended) {
    // Nobody changes it between its end and its publication.
    int64_t array_bytes = 0;
    for (const v1::LogprobItem& item : op->logprobs) {
      array_bytes += static_cast<int64_t>(item.ByteSizeLong());
    }
    const v1::JournalOutcome outcome =
        OutcomeOf(*op, array_bytes <= kMostArrayBytes);
    GW_RETURN_IF_ERROR(AwaitSpace([&]() -> absl::Status {
      GW_ASSIGN_OR_RETURN(
          const Oplog::Range range,
          journal_->AppendOutcome(op->handle, op->seq, outcome));
      op->outcome_at = range.begin;
      return absl::OkStatus();
    }));
    durable = durable || MustBeDurable(*op);
  }
  Failpoint("op.after_record");
  if (durable) {
    GW_RETURN_IF_ERROR(journal_->Sync());
    GW_RETURN_IF_ERROR(AwaitSpace([&] { return journal_->SetWatermark(); }));
  }
  Failpoint("op.before_reply");
  return absl::OkStatus();
}

void Job::Publish(const OperationPtr& op, bool recorded) {
  if (!recorded) {
    // Whether it has happened will be known when the log has been examined.
    op->final_state = v1::OPERATION_STATE_FAILED;
    if (!op->record.has_error()) {
      op->record.clear_result();
      *op->record.mutable_error() = job_.error();
    }
  } else {
    if (auto handle = FindHandle(op->model_id); handle.ok()) {
      CountDurable(**handle);
    }
    unreferenced_.push_back(op);
  }
  op->record.set_state(op->final_state);
  op->changed.SignalAll();
  if (op->kind == v1::OPERATION_KIND_UNSPECIFIED) return;
  // One that failed may have taken a name all the same.
  std::string saved = op->replaces;
  if (op->record.has_save_state()) saved = op->record.save_state().path();
  if (op->record.has_snapshot()) saved = op->record.snapshot().path();
  if (const auto ref = ParseCatalogueRef(saved, "path"); ref.ok()) {
    environment_->on_saved(*ref);
  }
  results_.push_back(op);
  environment_->sessions->Publish(op->session_id, op->record);
  Measure(op);
}

void Job::CountDurable(Handle& handle) const {
  const int64_t durable = journal_->durable();
  const auto is_durable = [&](const Operation& op) {
    const int64_t at = op.logged_at >= 0 ? op.logged_at : op.outcome_at;
    // Of what the log has let go, the metadata know.
    return at >= 0 ? at < durable : op.Final();
  };
  handle.durable_through =
      handle.queue.PassThrough(handle.durable_through, is_durable);
}

void Job::BreakJournal(const absl::Status& status) {
  spdlog::error("job {}: its op-log cannot be used: {}", id_,
                std::string(status.message()));
  JobEvent failed{JobEvent::kRanksFailed};
  failed.status = status;
  {
    absl::MutexLock lock(&mu_);
    journal_broken_ = true;
    Break(status);
    recovering_ = false;
    restart_due_ = false;
  }
  Apply(failed);
}

}  // namespace gradwire
