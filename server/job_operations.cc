// SPDX-License-Identifier: Apache-2.0
// The operations of a job: in by number, waited for, read, kept and forgotten.
#include "base/error.h"
#include "base/status.h"
#include "server/grpc_status.h"
#include "server/job.h"
#include "server/job_errors.h"
#include "trainer/rank_plan.h"

namespace gradwire {
namespace {

// After so much of it, the log is shortened without a checkpoint if it can be.
constexpr int64_t kLogBytes = int64_t{256} << 20;

}  // namespace

std::vector<int> Job::Assign(const std::vector<DatumShape>& shapes) const {
  if (world_size() == 1) return {};
  std::vector<int64_t> tokens;
  for (const DatumShape& shape : shapes) tokens.push_back(shape.n);
  double quadratic = 0;
  {
    absl::MutexLock lock(&mu_);
    quadratic = quadratic_;
  }
  return AssignRanks(tokens, quadratic, world_size());
}

absl::Status Job::CheckSubmit(const std::string& model_id, int64_t seq,
                              v1::OperationKind kind) const {
  absl::MutexLock lock(&mu_);
  GW_ASSIGN_OR_RETURN(Handle * handle, FindHandle(model_id));
  // A repetition is answered whatever has become of the handle.
  if (handle->queue.Find(seq) != nullptr) return absl::OkStatus();
  GW_RETURN_IF_ERROR(CheckHandle(*handle, kind));
  return handle->queue.CheckSeq(seq);
}

absl::StatusOr<OperationPtr> Job::Submit(const std::string& model_id,
                                         int64_t seq, v1::OperationKind kind,
                                         OperationRequest request,
                                         const std::string& activation_id,
                                         double retain_ttl_seconds,
                                         std::vector<DatumShape> shapes) {
  // Of backwards, as their forwards had it.
  std::vector<int> rank_of;
  if (request.command.has_forward()) rank_of = Assign(shapes);
  auto op = std::make_shared<Operation>();
  op->op_id = model_id + "." + std::to_string(seq);
  op->model_id = model_id;
  op->seq = seq;
  op->kind = kind;
  op->rank_of = std::move(rank_of);
  op->digest = request.digest;
  op->bytes = request.bytes;
  op->tokens = request.tokens;
  op->activation_id = activation_id;
  op->retain_ttl_seconds = retain_ttl_seconds;
  op->shapes = std::move(shapes);
  const v1::RankSaveState& save = request.command.save_state();
  if (save.replaces()) op->replaces = save.path();
  op->loads = request.command.has_load_state();
  op->request = std::move(request);
  op->submitted = Clock::now();
  op->record.set_op_id(op->op_id);
  op->record.set_model_id(model_id);
  op->record.set_seq_id(seq);
  op->record.set_kind(kind);
  op->record.set_state(v1::OPERATION_STATE_QUEUED);
  op->record.set_queue_state(v1::QUEUE_STATE_ACTIVE);
  *op->record.mutable_create_time() = WallNow();
  GW_ASSIGN_OR_RETURN(const OperationPtr admitted, Admit(op));
  if (admitted != op) return admitted;

  // What cannot be recorded when it has been run is not begun.
  const absl::Status room = environment_->reserve->Hold();
  const absl::StatusOr<int64_t> at =
      absl::IsResourceExhausted(room) ? room : Log(op);
  const absl::Status logged = at.status();
  absl::MutexLock lock(&mu_);
  op->logging = false;
  op->logged_at = at.value_or(-1);
  op->log_failure = logged;
  op->changed.SignalAll();
  if (op->Ended()) {
    // Fenced, say, meanwhile.
    op->request = OperationRequest();
    return op;
  }
  GW_ASSIGN_OR_RETURN(Handle * handle, FindHandle(model_id));
  if (!logged.ok()) {
    handle->queue.Withdraw(op);
    if (auto it = activations_.find(activation_id); it != activations_.end()) {
      if (kind == v1::OPERATION_KIND_FORWARD) {
        activations_.erase(it);
      } else {
        --it->second.pins;
      }
    }
    return logged;
  }
  environment_->metrics->SetQueue(id_, handle->queue.queued(),
                                  handle->queue.queued_bytes());
  work_.SignalAll();
  return op;
}

absl::StatusOr<OperationPtr> Job::Admit(const OperationPtr& op) {
  absl::MutexLock lock(&mu_);
  GW_ASSIGN_OR_RETURN(Handle * handle, FindHandle(op->model_id));
  if (handle->queue.Find(op->seq) == nullptr) {
    // What is retained is for a backward, so it is judged as one.
    const bool retains =
        op->kind == v1::OPERATION_KIND_FORWARD && !op->activation_id.empty();
    GW_RETURN_IF_ERROR(
        CheckHandle(*handle, retains ? v1::OPERATION_KIND_BACKWARD : op->kind));
  }
  op->session_id = handle->session_id;
  op->handle = handle->number;
  op->logging = true;
  op->log_from = journal_->end();
  absl::StatusOr<OperationPtr> admitted =
      handle->queue.Submit(op, Clock::now());
  if (!admitted.ok()) {
    const auto detail = GetErrorDetail(admitted.status());
    if (detail->reason == "SEQ_REUSED") {
      environment_->metrics->CountDedup(KindName(op->kind), "conflict");
    } else if (detail->reason == "QUEUE_FULL") {
      environment_->metrics->CountRejected("queue_full");
    }
    return admitted.status();
  }
  if (*admitted != op) {
    const OperationPtr earlier = *admitted;
    environment_->metrics->CountDedup(KindName(op->kind),
                                      earlier->Final() ? "replayed" : "joined");
    while (earlier->logging) earlier->changed.Wait(&mu_);
    GW_RETURN_IF_ERROR(earlier->log_failure);
    return earlier;
  }
  if (op->kind == v1::OPERATION_KIND_FORWARD && !op->activation_id.empty()) {
    Activation& activation = activations_[op->activation_id];
    activation.session_id = op->session_id;
    activation.shapes = op->shapes;
    activation.rank_of = op->rank_of;
    activation.ttl = RetainTtl(*op);
    activation.pins = 1;  // until the forward has ended
  } else if (auto it = activations_.find(op->activation_id);
             it != activations_.end()) {
    ++it->second.pins;
    op->rank_of = it->second.rank_of;
  }
  return op;
}

std::chrono::milliseconds Job::RetainTtl(const Operation& op) const {
  return op.retain_ttl_seconds > 0
             ? std::chrono::milliseconds(
                   static_cast<int64_t>(op.retain_ttl_seconds * 1000))
             : environment_->retain_ttl;
}

void Job::EndSeq(const std::string& model_id, int64_t seq,
                 v1::OperationKind kind, const absl::Status& status) {
  absl::MutexLock lock(&mu_);
  auto handle = FindHandle(model_id);
  if (!handle.ok() || (*handle)->fenced || (*handle)->unloaded ||
      !(*handle)->queue.CheckSeq(seq).ok() ||
      (*handle)->queue.Find(seq) != nullptr) {
    return;
  }
  auto op = std::make_shared<Operation>();
  op->op_id = model_id + "." + std::to_string(seq);
  op->model_id = model_id;
  op->session_id = (*handle)->session_id;
  op->handle = (*handle)->number;
  op->seq = seq;
  op->kind = kind;
  // No request has this digest: another one under this number is a reuse.
  op->digest = "ended";
  op->submitted = Clock::now();
  op->record.set_op_id(op->op_id);
  op->record.set_model_id(model_id);
  op->record.set_seq_id(seq);
  op->record.set_kind(kind);
  *op->record.mutable_create_time() = WallNow();
  (*handle)->queue.Close(op);
  Finish(op,
         absl::IsCancelled(status) ? v1::OPERATION_STATE_CANCELLED
                                   : v1::OPERATION_STATE_FAILED,
         status);
  work_.SignalAll();
  // Whoever is told counts on it.
  while (!op->Final() && !stopping_) op->changed.Wait(&mu_);
}

void Job::Hold(const std::string& model_id, int64_t seq,
               const std::string& activation_id) {
  absl::MutexLock lock(&mu_);
  auto handle = FindHandle(model_id);
  if (handle.ok()) (*handle)->queue.Hold(seq);
  auto it = activations_.find(activation_id);
  if (it != activations_.end()) ++it->second.pins;
}

void Job::Unhold(const std::string& model_id, int64_t seq,
                 const std::string& activation_id) {
  absl::MutexLock lock(&mu_);
  auto handle = FindHandle(model_id);
  if (handle.ok()) (*handle)->queue.Unhold(seq, Clock::now());
  auto it = activations_.find(activation_id);
  if (it != activations_.end()) {
    --it->second.pins;
    it->second.delivered = Clock::now();
  }
}

absl::StatusOr<std::vector<DatumShape>> Job::ActivationShapes(
    const std::string& model_id, const std::string& activation_id) const {
  absl::MutexLock lock(&mu_);
  GW_RETURN_IF_ERROR(FindHandle(model_id).status());
  auto it = activations_.find(activation_id);
  if (it != activations_.end()) return it->second.shapes;
  return ErrorBuilder(absl::StatusCode::kNotFound, "ACTIVATIONS_EXPIRED")
      .With("field", "activation_id")
      .With("value", activation_id.substr(0, 64))
      .Message(
          "No activations are kept under this id: they were used, released or "
          "have expired. Send the batch again as forward_backward with weights "
          "-dC/dlogprob.");
}

void Job::DropActivations(const std::string& activation_id) {
  absl::MutexLock lock(&mu_);
  auto it = activations_.find(activation_id);
  if (it == activations_.end() || it->second.pins > 0) return;
  Release(activation_id);
  work_.SignalAll();
}

OperationPtr Job::FindOperation(const std::string& model_id,
                                int64_t seq) const {
  absl::MutexLock lock(&mu_);
  auto handle = FindHandle(model_id);
  return handle.ok() ? (*handle)->queue.Find(seq) : nullptr;
}

void Job::Describe(const OperationPtr& op, v1::Operation& out) const {
  out = op->record;
  auto handle = FindHandle(op->model_id);
  if (!handle.ok()) return;
  if (op->Final()) {
    // How it is now, which is no part of the result.
    const bool logged = op->outcome_at >= 0;
    out.set_durable(journal_ != nullptr &&
                    (!logged || op->outcome_at < journal_->durable()));
    out.set_durable_through_seq((*handle)->durable_through);
  }
  if (op->result_expired && op->record.state() == v1::OPERATION_STATE_DONE) {
    out.clear_result();
    out.set_state(v1::OPERATION_STATE_FAILED);
    *out.mutable_error() = ToOperationError(
        ErrorBuilder(absl::StatusCode::kFailedPrecondition, "RESULT_EXPIRED")
            .With("seq_id", op->seq)
            .Message("The operation was executed and its result has been kept "
                     "for its time. It is not run again."));
    return;
  }
  if (op->record.state() != v1::OPERATION_STATE_QUEUED) return;
  const OpQueue& queue = (*handle)->queue;
  out.set_queue_position(static_cast<int32_t>(
      queue.Position(op) + static_cast<int64_t>(in_flight_.size())));
  if (queue.BlockedOnGap(op)) {
    out.set_state(v1::OPERATION_STATE_BLOCKED_ON_GAP);
  }
}

v1::Operation Job::Describe(const OperationPtr& op) const {
  absl::MutexLock lock(&mu_);
  v1::Operation out;
  Describe(op, out);
  return out;
}

v1::Operation Job::Wait(const OperationPtr& op, absl::Duration timeout) const {
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&mu_);
  while (!op->Final() && !stopping_) {
    if (op->changed.WaitWithDeadline(&mu_, deadline)) break;
  }
  v1::Operation out;
  Describe(op, out);
  return out;
}

Job::Items Job::ReadItems(const OperationPtr& op, size_t from,
                          absl::Duration timeout) const {
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&mu_);
  while (!op->Final() && op->logprobs.size() <= from && !stopping_) {
    if (op->changed.WaitWithDeadline(&mu_, deadline)) break;
  }
  Items out;
  out.final = op->Final();
  out.expired = op->expired;
  if (from < op->logprobs.size()) {
    out.items.assign(op->logprobs.begin() + from, op->logprobs.end());
  }
  return out;
}

absl::Status Job::LoadItems(const OperationPtr& op) {
  int64_t at = 0;
  {
    absl::MutexLock lock(&mu_);
    if (!op->stored || op->expired) return absl::OkStatus();
    at = op->outcome_at;
  }
  absl::StatusOr<Journal::Entry> entry = journal_->Read(at);
  absl::MutexLock lock(&mu_);
  if (absl::IsNotFound(entry.status())) Expire(op);
  if (!op->stored) return absl::OkStatus();
  GW_RETURN_IF_ERROR(entry.status());
  op->stored = false;
  for (v1::LogprobItem& item : *entry->outcome->mutable_logprobs()) {
    op->logprobs.emplace_back().Swap(&item);
  }
  return absl::OkStatus();
}

bool Job::CopyItems(const OperationPtr& op, int64_t most,
                    v1::LogprobChunk* to) const {
  absl::MutexLock lock(&mu_);
  if (op->stored || op->expired) return false;
  for (const v1::LogprobItem& item : op->logprobs) {
    most -= static_cast<int64_t>(item.ByteSizeLong());
    if (most < 0) return false;
    *to->add_items() = item;
  }
  return true;
}

v1::CommitRecord Job::ItemsCommit(const OperationPtr& op) const {
  absl::MutexLock lock(&mu_);
  return op->logprobs_commit;
}

v1::Operation Job::Cancel(const OperationPtr& op) {
  absl::MutexLock lock(&mu_);
  auto handle = FindHandle(op->model_id);
  if (handle.ok() && (*handle)->queue.Cancel(op)) {
    Finish(op, v1::OPERATION_STATE_CANCELLED,
           ErrorBuilder(absl::StatusCode::kCancelled, "OPERATION_CANCELLED")
               .With("seq_id", op->seq)
               .Message("The operation was cancelled before it ran."));
    work_.SignalAll();
  }
  // Its end is told when it is recorded.
  while (op->Ended() && !op->Final() && !stopping_) op->changed.Wait(&mu_);
  v1::Operation out;
  Describe(op, out);
  return out;
}

void Job::Acknowledge(const OperationPtr& op) {
  absl::MutexLock lock(&mu_);
  if (!op->Final()) return;
  op->acknowledged = true;
  op->expired = op->expired || op->stored || !op->logprobs.empty();
  std::vector<v1::LogprobItem>().swap(op->logprobs);
}

// ---- What is kept, and for how long -----------------------------------------

void Job::Housekeep(Clock::time_point now) {
  if (current_ != nullptr) {
    const int64_t missing = current_->queue.next_seq();
    const auto expired = current_->queue.ExpireGap(now);
    if (!expired.empty()) {
      current_->closed_below = current_->queue.next_seq();
    }
    for (const OperationPtr& op : expired) {
      op->closed_below = current_->closed_below;
      Finish(op, v1::OPERATION_STATE_FAILED, SequenceGap(op->seq, missing));
    }
  }
  std::vector<std::string> expired;
  for (const auto& [id, activation] : activations_) {
    if (activation.pins > 0) continue;
    const auto alive =
        std::max(activation.delivered,
                 environment_->sessions->LastSeen(activation.session_id));
    if (now - alive > activation.ttl) expired.push_back(id);
  }
  for (const std::string& id : expired) Release(id);
  while (!results_.empty() &&
         now - results_.front()->ended > environment_->result_retention) {
    Expire(results_.front());
    results_.pop_front();
  }
  if (!committing_) DropShapes();
  // What needs no checkpoint must not keep the log for ever.
  if (!journal_broken_ && references_.empty() && !committing_ &&
      journal_->end() - referenced_at_ > kLogBytes) {
    referenced_at_ = journal_->end();
    references_.push_back({});
    commit_work_.Signal();
  }
}

void Job::Expire(const OperationPtr& op) {
  op->expired = true;
  op->result_expired = true;
  op->stored = false;
  std::vector<v1::LogprobItem>().swap(op->logprobs);
  // What tells a repetition that it was executed stays, and what running it
  // again needs, for as long as that may happen.
  if (!op->shapes.empty()) shapes_to_drop_.push_back(op);
}

void Job::DropShapes() {
  std::erase_if(shapes_to_drop_, [this](const OperationPtr& op) {
    const auto has = [&op](const auto& operations) {
      return std::find(operations.begin(), operations.end(), op) !=
             operations.end();
    };
    if (has(history_) || has(unreferenced_)) return false;
    std::vector<DatumShape>().swap(op->shapes);
    return true;
  });
}

void Job::Release(const std::string& activation_id) {
  activations_.erase(activation_id);
  auto op = std::make_shared<Operation>();
  op->request.command.set_release_activation_id(activation_id);
  control_.push_back(op);
}

}  // namespace gradwire
