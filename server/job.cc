// SPDX-License-Identifier: Apache-2.0
#include "server/job.h"

#include <algorithm>

#include "base/check.h"
#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "google/protobuf/util/time_util.h"
#include "server/grpc_status.h"
#include "server/payload_digest.h"

namespace gradwire {
namespace {

constexpr size_t kMaxInFlight = 2;
constexpr auto kInUse = std::chrono::seconds(30);
constexpr absl::Duration kTick = absl::Milliseconds(250);

google::protobuf::Timestamp WallNow() {
  return google::protobuf::util::TimeUtil::NanosecondsToTimestamp(
      absl::ToUnixNanos(absl::Now()));
}

absl::Status Fenced() {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "HANDLE_FENCED")
      .Message(
          "A newer handle has taken over this model. Create a model with "
          "take_over to get it back.");
}

absl::Status Unloaded() {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "MODEL_UNLOADED")
      .Message("The model was unloaded through this handle. Create another.");
}

absl::Status Unsupported(const std::string& field, const std::string& value) {
  return ErrorBuilder(absl::StatusCode::kUnimplemented, "UNSUPPORTED_OPTION")
      .With("field", field)
      .With("value", value)
      .Message(field + " is not supported by this server; leave it unset.");
}

ErrorBuilder Mismatch(const std::string& field, const std::string& value,
                      const std::string& limit) {
  ErrorBuilder error(absl::StatusCode::kFailedPrecondition,
                     "MODEL_CONFIG_MISMATCH");
  error.With("field", field).With("value", value).With("limit", limit);
  return error;
}

}  // namespace

Job::Job(std::string job_id, const v1::JobSpec& spec,
         JobEnvironment* environment)
    : id_(std::move(job_id)),
      spec_(spec),
      environment_(environment),
      token_(RandomHex(16)),
      created_(Clock::now()) {
  job_.set_job_id(id_);
  *job_.mutable_spec() = spec_;
  *job_.mutable_create_time() = WallNow();
  *job_.mutable_update_time() = WallNow();
  StartJob(job_);
}

Job::~Job() {
  Stop();
  if (executor_.joinable()) executor_.join();
  process_.reset();
}

void Job::Stop() {
  absl::MutexLock lock(&mu_);
  if (stopping_) return;
  stopping_ = true;
  FailOperations();
  if (process_ != nullptr) process_->Kill();
  work_.SignalAll();
  state_changed_.SignalAll();
}

void Job::Start() {
  std::vector<std::string> argv = {
      environment_->rank_binary, "--supervisor=" + environment_->rank_address,
      "--job_id=" + id_,
      "--threads=" + std::to_string(spec_.threads() > 0
                                        ? spec_.threads()
                                        : environment_->threads)};
  auto process = RankProcess::Start(
      argv, {{"GRADWIRE_JOIN_TOKEN", token_}}, [this](absl::Status status) {
        spdlog::info("job {}: {}", id_, std::string(status.message()));
        environment_->metrics->SetRankUp(id_, false);
        {
          absl::MutexLock lock(&mu_);
          process_ended_ = true;
        }
        Apply({JobEvent::kRankExited, {}, 0, status});
      });
  if (!process.ok()) {
    {
      absl::MutexLock lock(&mu_);
      process_ended_ = true;
    }
    Apply({JobEvent::kStartFailed, {}, 0, process.status()});
    return;
  }
  {
    absl::MutexLock lock(&mu_);
    process_ = *std::move(process);
    // Deleted or stopped before there was a process to end.
    if (stopping_ || job_.state() == v1::JOB_STATE_DELETING) process_->Kill();
  }
  executor_ = std::thread([this] { Run(); });
  Apply({JobEvent::kStarted, {}, 0, absl::OkStatus()});
}

void Job::Delete() {
  Apply({JobEvent::kDelete, {}, 0, absl::OkStatus()});
  {
    absl::MutexLock lock(&mu_);
    while (!process_ended_) state_changed_.WaitWithTimeout(&mu_, kTick);
  }
  Apply({JobEvent::kStopped, {}, 0, absl::OkStatus()});
  Stop();
}

void Job::Changed() {
  ++version_;
  *job_.mutable_update_time() = WallNow();
  state_changed_.SignalAll();
  work_.SignalAll();
}

void Job::Apply(const JobEvent& event) {
  absl::MutexLock lock(&mu_);
  const bool was_ready = job_.ready();
  if (event.kind == JobEvent::kProgress) {
    *job_.mutable_last_progress_time() = WallNow();
  }
  for (JobAction action : Decide(event, job_)) {
    switch (action) {
      case JobAction::kFailOperations:
        FailOperations();
        break;
      case JobAction::kStopRank:
        if (process_ != nullptr) process_->Kill();
        break;
      case JobAction::kStartRank:
      case JobAction::kReportStopped:
        break;
    }
  }
  if (job_.ready() && !was_ready) {
    job_.set_seconds_to_ready(
        std::chrono::duration<double>(Clock::now() - created_).count());
  }
  if (job_.state() == v1::JOB_STATE_FAILED) {
    spdlog::warn("job {} failed: {}: {}", id_, job_.status_reason(),
                 job_.status_message());
  }
  if (job_.state() == v1::JOB_STATE_DELETED) {
    environment_->metrics->RemoveJob(id_);
  } else {
    environment_->metrics->SetJobState(id_, JobStateName(job_.state()),
                                       JobPhaseName(job_.phase()));
  }
  if (environment_->on_change) environment_->on_change(job_);
  Changed();
}

v1::Job Job::Get() const {
  absl::MutexLock lock(&mu_);
  return job_;
}

bool Job::ready() const {
  absl::MutexLock lock(&mu_);
  return job_.ready();
}

bool Job::busy() const {
  absl::MutexLock lock(&mu_);
  return !in_flight_.empty();
}

v1::Job Job::WaitForChange(int64_t& version, absl::Duration timeout) const {
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&mu_);
  while (version_ == version) {
    if (state_changed_.WaitWithDeadline(&mu_, deadline)) break;
  }
  version = version_;
  return job_;
}

absl::Status Job::Unready() const {
  if (job_.ready()) return absl::OkStatus();
  if (job_.state() == v1::JOB_STATE_FAILED) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "JOB_FAILED")
        .Server()
        .With("job_id", id_)
        .With("cause", job_.status_reason())
        .Message("The job has failed: " + job_.status_message());
  }
  if (job_.state() == v1::JOB_STATE_DELETING ||
      job_.state() == v1::JOB_STATE_DELETED) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "JOB_DELETED")
        .With("job_id", id_)
        .Message("The job was deleted. Create another.");
  }
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "JOB_NOT_READY")
      .Server()
      .With("job_id", id_)
      .With("value", JobPhaseName(job_.phase()))
      .With("limit", "ready")
      .Message("The job is not ready yet. Watch it until `ready` is set.");
}

absl::StatusOr<v1::Profile> Job::GetProfile() const {
  absl::MutexLock lock(&mu_);
  GW_RETURN_IF_ERROR(Unready());
  return profile_;
}

v1::Profile Job::LastProfile() const {
  absl::MutexLock lock(&mu_);
  return profile_;
}

// ---- Handles ---------------------------------------------------------------

absl::StatusOr<Job::Handle*> Job::FindHandle(
    const std::string& model_id) const {
  auto it = handles_.find(model_id);
  if (it != handles_.end()) return it->second.get();
  return ErrorBuilder(absl::StatusCode::kNotFound, "MODEL_NOT_FOUND")
      .With("field", "model_id")
      .With("value", model_id.substr(0, 128))
      .Message("There is no such model. CreateModel gives its id.");
}

absl::Status Job::CheckHandle(const Handle& handle,
                              v1::OperationKind kind) const {
  if (environment_->draining) {
    environment_->metrics->CountRejected("draining");
    return ErrorBuilder(absl::StatusCode::kUnavailable, "SERVER_DRAINING")
        .Server()
        .With("retry_after_seconds", 5.0)
        .Message("The server is stopping. Try again when it is back.");
  }
  GW_RETURN_IF_ERROR(Unready());
  if (handle.fenced) return Fenced();
  if (handle.unloaded && kind != v1::OPERATION_KIND_UNLOAD_MODEL) {
    return Unloaded();
  }
  if (handle.request.mode() == v1::MODEL_MODE_FORWARD_ONLY &&
      kind != v1::OPERATION_KIND_FORWARD &&
      kind != v1::OPERATION_KIND_UNLOAD_MODEL) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "MODEL_FORWARD_ONLY")
        .With("field", "mode")
        .With("value", KindName(kind))
        .With("limit", "forward")
        .Message(
            "The model was created forward-only; it answers forward "
            "alone.");
  }
  return absl::OkStatus();
}

void Job::Fence(Handle& handle, const absl::Status& error) {
  for (const OperationPtr& op : handle.queue.Drain()) {
    Finish(op, v1::OPERATION_STATE_FAILED, error);
  }
}

absl::StatusOr<v1::CreateModelResponse> Job::CreateModel(
    const v1::CreateModelRequest& request) {
  if (request.lora().rank() != 0) {
    return Unsupported("lora.rank", std::to_string(request.lora().rank()));
  }
  if (!request.init_from().ref().empty()) {
    return Unsupported("init_from", request.init_from().ref().substr(0, 64));
  }
  if (request.mode() == v1::MODEL_MODE_BASE_ONLY ||
      !v1::ModelMode_IsValid(request.mode())) {
    return Unsupported("mode", std::to_string(request.mode()));
  }
  GW_RETURN_IF_ERROR(environment_->sessions->Check(request.session_id()));
  if (request.model_seq_id() < 1) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "SEQ_INVALID")
        .With("field", "model_seq_id")
        .With("value", request.model_seq_id())
        .With("limit", 1)
        .Message("model_seq_id starts at 1.");
  }
  const auto key = std::make_pair(request.session_id(), request.model_seq_id());
  OperationPtr reset;
  v1::CreateModelResponse response;
  {
    absl::MutexLock lock(&mu_);
    // The same call again, while the first one waits for the rank.
    while (creating_.count(key) != 0) state_changed_.Wait(&mu_);
    if (auto it = created_models_.find(key); it != created_models_.end()) {
      return it->second;
    }
    GW_RETURN_IF_ERROR(Unready());
    if (environment_->draining) {
      return CheckHandle(Handle(environment_->queue),
                         v1::OPERATION_KIND_FORWARD);
    }
    if (!request.base_model().empty() &&
        request.base_model() != spec_.base_model()) {
      return Mismatch("base_model", request.base_model().substr(0, 256),
                      spec_.base_model())
          .Message("The job holds another base model.");
    }
    if (current_ != nullptr && !current_->unloaded && !request.take_over() &&
        current_->session_id != request.session_id() &&
        Clock::now() - environment_->sessions->LastSeen(current_->session_id) <
            kInUse) {
      return ErrorBuilder(absl::StatusCode::kFailedPrecondition, "MODEL_IN_USE")
          .With("field", "take_over")
          .With("value", "false")
          .With("job_id", id_)
          .Message(
              "A live session holds this model. Set take_over to fence "
              "it.");
    }
    if (spec_.forward_only() && request.mode() != v1::MODEL_MODE_FORWARD_ONLY) {
      return Mismatch("mode", "train", "forward_only")
          .Message(
              "The job was created forward-only; create the model with "
              "that mode.");
    }
    response.set_attached(current_ != nullptr);
    if (current_ != nullptr) {
      current_->fenced = true;
      Fence(*current_, Fenced());
    }
    auto handle = std::make_unique<Handle>(environment_->queue);
    handle->model_id = id_ + "." + RandomHex(8);
    handle->session_id = request.session_id();
    handle->request = request;
    response.set_model_id(handle->model_id);
    current_ = handle.get();
    ++num_handles_;
    handles_[handle->model_id] = std::move(handle);
    activations_.clear();
    // Before anything of the new handle, after what the old one has running.
    reset = std::make_shared<Operation>();
    reset->request.command.mutable_reset();
    control_.push_back(reset);
    work_.SignalAll();
    creating_.insert(key);
    while (!reset->Final()) reset->changed.Wait(&mu_);
    creating_.erase(key);
    state_changed_.SignalAll();
    if (reset->record.state() != v1::OPERATION_STATE_DONE) return Unready();
    response.set_weight_version(job_.weight_version());
    response.set_optimizer_step(job_.optimizer_step());
    response.set_dropped_forward_backward_ops(reset->record.queue_position());
    created_models_[key] = response;
  }
  return response;
}

absl::StatusOr<v1::ModelInfo> Job::GetModelInfo(
    const std::string& model_id) const {
  absl::MutexLock lock(&mu_);
  GW_ASSIGN_OR_RETURN(Handle * handle, FindHandle(model_id));
  v1::ModelInfo info;
  info.set_model_id(model_id);
  info.set_job_id(id_);
  info.set_base_model(spec_.base_model());
  info.set_tokenizer_id(profile_.tokenizer_id());
  info.set_mode(handle->request.mode() == v1::MODEL_MODE_UNSPECIFIED
                    ? v1::MODEL_MODE_TRAIN
                    : handle->request.mode());
  info.set_weight_version(job_.weight_version());
  info.set_optimizer_step(job_.optimizer_step());
  info.set_next_seq_id(handle->queue.next_seq());
  return info;
}

// ---- Operations ------------------------------------------------------------

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
  absl::MutexLock lock(&mu_);
  GW_ASSIGN_OR_RETURN(Handle * handle, FindHandle(model_id));
  if (handle->queue.Find(seq) == nullptr) {
    // What is retained is for a backward, so it is judged as one.
    const bool retains =
        kind == v1::OPERATION_KIND_FORWARD && !activation_id.empty();
    GW_RETURN_IF_ERROR(
        CheckHandle(*handle, retains ? v1::OPERATION_KIND_BACKWARD : kind));
  }
  auto op = std::make_shared<Operation>();
  op->op_id = model_id + "." + std::to_string(seq);
  op->model_id = model_id;
  op->session_id = handle->session_id;
  op->seq = seq;
  op->kind = kind;
  op->digest = request.digest;
  op->bytes = request.bytes;
  op->tokens = request.tokens;
  op->activation_id = activation_id;
  op->shapes = std::move(shapes);
  op->request = std::move(request);
  op->submitted = Clock::now();
  op->record.set_op_id(op->op_id);
  op->record.set_model_id(model_id);
  op->record.set_seq_id(seq);
  op->record.set_kind(kind);
  op->record.set_state(v1::OPERATION_STATE_QUEUED);
  op->record.set_queue_state(v1::QUEUE_STATE_ACTIVE);
  *op->record.mutable_create_time() = WallNow();
  absl::StatusOr<OperationPtr> admitted =
      handle->queue.Submit(op, Clock::now());
  if (!admitted.ok()) {
    const auto detail = GetErrorDetail(admitted.status());
    if (detail->reason == "SEQ_REUSED") {
      environment_->metrics->CountDedup(KindName(kind), "conflict");
    } else if (detail->reason == "QUEUE_FULL") {
      environment_->metrics->CountRejected("queue_full");
    }
    return admitted.status();
  }
  if (*admitted != op) {
    environment_->metrics->CountDedup(
        KindName(kind), (*admitted)->Final() ? "replayed" : "joined");
    return admitted;
  }
  if (kind == v1::OPERATION_KIND_FORWARD && !activation_id.empty()) {
    Activation& activation = activations_[activation_id];
    activation.session_id = op->session_id;
    activation.shapes = op->shapes;
    activation.ttl = retain_ttl_seconds > 0
                         ? std::chrono::milliseconds(
                               static_cast<int64_t>(retain_ttl_seconds * 1000))
                         : environment_->retain_ttl;
    activation.pins = 1;  // until the forward has ended
  } else if (auto it = activations_.find(activation_id);
             it != activations_.end()) {
    ++it->second.pins;
  }
  environment_->metrics->SetQueue(id_, handle->queue.queued(),
                                  handle->queue.queued_bytes());
  work_.SignalAll();
  return op;
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
  if (op->record.state() != v1::OPERATION_STATE_QUEUED) return;
  auto handle = FindHandle(op->model_id);
  if (!handle.ok()) return;
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
  v1::Operation out;
  Describe(op, out);
  return out;
}

void Job::Acknowledge(const OperationPtr& op) {
  absl::MutexLock lock(&mu_);
  if (!op->Final()) return;
  op->acknowledged = true;
  op->expired = op->expired || !op->logprobs.empty();
  std::vector<v1::LogprobItem>().swap(op->logprobs);
}

// ---- The executor ----------------------------------------------------------

void Job::Run() {
  mu_.Lock();
  while (!stopping_) {
    Housekeep(Clock::now());
    std::vector<v1::RankCommand> commands;
    if (connected_ && !load_sent_) {
      load_sent_ = true;
      v1::RankCommand load;
      load.set_command_id(next_command_++);
      *load.mutable_load()->mutable_spec() = spec_;
      load.mutable_load()->set_job_id(id_);
      commands.push_back(std::move(load));
    } else if (job_.ready() && !control_.empty()) {
      OperationPtr op = control_.front();
      control_.pop_front();
      commands = Begin(op);
    } else if (job_.ready() && current_ != nullptr &&
               in_flight_.size() < kMaxInFlight) {
      if (OperationPtr op = current_->queue.TakeNext(); op != nullptr) {
        commands = Begin(op);
      }
    }
    if (commands.empty()) {
      work_.WaitWithTimeout(&mu_, kTick);
      continue;
    }
    mu_.Unlock();
    Send(std::move(commands));
    mu_.Lock();
  }
  mu_.Unlock();
}

void Job::Send(std::vector<v1::RankCommand> commands) {
  absl::MutexLock lock(&write_mu_);
  for (const v1::RankCommand& command : commands) {
    // A broken stream is followed by the end of the rank, which fails what was
    // sent.
    if (stream_ == nullptr || !stream_->Write(command)) return;
  }
}

std::vector<v1::RankCommand> Job::Begin(const OperationPtr& op) {
  const int64_t id = next_command_++;
  std::vector<v1::RankCommand> commands;
  for (v1::DatumChunk& chunk : op->request.datums) {
    commands.emplace_back().set_command_id(id);
    commands.back().mutable_datums()->Swap(&chunk);
  }
  for (v1::GradientChunk& chunk : op->request.gradients) {
    commands.emplace_back().set_command_id(id);
    commands.back().mutable_gradients()->Swap(&chunk);
  }
  commands.push_back(std::move(op->request.command));
  commands.back().set_command_id(id);
  op->request = OperationRequest();
  op->started = Clock::now();
  op->record.set_state(v1::OPERATION_STATE_RUNNING);
  *op->record.mutable_start_time() = WallNow();
  op->changed.SignalAll();
  in_flight_.emplace_back(id, op);
  if (op->kind != v1::OPERATION_KIND_UNSPECIFIED && current_ != nullptr) {
    environment_->metrics->SetQueue(id_, current_->queue.queued(),
                                    current_->queue.queued_bytes());
  }
  return commands;
}

void Job::Housekeep(Clock::time_point now) {
  if (current_ != nullptr) {
    const int64_t missing = current_->queue.next_seq();
    for (const OperationPtr& op : current_->queue.ExpireGap(now)) {
      Finish(op, v1::OPERATION_STATE_FAILED,
             ErrorBuilder(absl::StatusCode::kAborted, "SEQUENCE_GAP")
                 .With("field", "seq_id")
                 .With("value", op->seq)
                 .With("missing", missing)
                 .Message("seq_id " + std::to_string(missing) +
                          " never arrived, so what came after it was dropped. "
                          "Send it again with the next free numbers."));
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
    Expire(*results_.front());
    results_.pop_front();
  }
}

void Job::Expire(Operation& op) {
  op.expired = true;
  std::vector<v1::LogprobItem>().swap(op.logprobs);
  std::vector<DatumShape>().swap(op.shapes);
  if (op.record.state() != v1::OPERATION_STATE_DONE) return;
  // What stays tells a repetition that it was executed.
  op.record.clear_result();
  op.record.set_state(v1::OPERATION_STATE_FAILED);
  *op.record.mutable_error() = ToOperationError(
      ErrorBuilder(absl::StatusCode::kFailedPrecondition, "RESULT_EXPIRED")
          .With("seq_id", op.seq)
          .Message("The operation was executed and its result has been kept "
                   "for its time. It is not run again."));
}

void Job::Release(const std::string& activation_id) {
  activations_.erase(activation_id);
  auto op = std::make_shared<Operation>();
  op->request.command.set_release_activation_id(activation_id);
  control_.push_back(op);
}

// ---- The rank --------------------------------------------------------------

bool Job::Connect(const std::string& token, int64_t pid, RankStream* stream) {
  {
    absl::MutexLock lock(&mu_);
    if (stopping_ || connected_ || token != token_) return false;
    spdlog::info("job {}: rank 0 connected, pid {}", id_, pid);
  }
  {
    absl::MutexLock lock(&write_mu_);
    stream_ = stream;
  }
  environment_->metrics->SetRankUp(id_, true);
  absl::MutexLock lock(&mu_);
  connected_ = true;
  work_.SignalAll();
  return true;
}

void Job::Disconnect() {
  {
    absl::MutexLock lock(&write_mu_);
    stream_ = nullptr;
  }
  // A rank that has lost its stream is of no use; its end is reported by the
  // process's watcher.
  absl::MutexLock lock(&mu_);
  if (process_ != nullptr) process_->Kill();
}

void Job::OnRankEvent(const v1::RankEvent& event) {
  switch (event.event_case()) {
    case v1::RankEvent::kProgress: {
      if (event.progress().has_memory()) {
        const v1::MemoryPlan& memory = event.progress().memory();
        absl::MutexLock lock(&mu_);
        *job_.mutable_memory() = memory;
        environment_->metrics->SetMemory(id_, memory);
      }
      Apply({JobEvent::kProgress, event.progress().phase(),
             event.progress().progress(), absl::OkStatus()});
      return;
    }
    case v1::RankEvent::kReady: {
      {
        absl::MutexLock lock(&mu_);
        profile_ = event.ready().profile();
        *job_.mutable_memory() = event.ready().memory();
        job_.set_device(profile_.device());
      }
      Apply({JobEvent::kReady, {}, 1, absl::OkStatus()});
      return;
    }
    case v1::RankEvent::kFailed:
      Apply(
          {JobEvent::kModelFailed, {}, 0, FromOperationError(event.failed())});
      return;
    case v1::RankEvent::kLogprobs: {
      absl::MutexLock lock(&mu_);
      OnLogprobs(event.logprobs());
      return;
    }
    case v1::RankEvent::kDone: {
      absl::MutexLock lock(&mu_);
      OnDone(event.done());
      return;
    }
    default:
      return;
  }
}

void Job::OnLogprobs(const v1::RankLogprobs& logprobs) {
  if (in_flight_.empty() || in_flight_.front().first != logprobs.command_id()) {
    return;
  }
  Operation& op = *in_flight_.front().second;
  for (const v1::LogprobItem& item : logprobs.chunk().items()) {
    op.logprobs.push_back(item);
  }
  op.changed.SignalAll();
}

void Job::OnDone(const v1::RankDone& done) {
  if (in_flight_.empty() || in_flight_.front().first != done.command_id()) {
    return;
  }
  OperationPtr op = in_flight_.front().second;
  in_flight_.pop_front();
  const bool stepped = done.optimizer_step() != job_.optimizer_step();
  job_.set_weight_version(done.weight_version());
  job_.set_optimizer_step(done.optimizer_step());
  if (done.has_error()) {
    Finish(op, v1::OPERATION_STATE_FAILED, FromOperationError(done.error()));
  } else {
    v1::Operation& record = op->record;
    switch (done.result_case()) {
      case v1::RankDone::kForward: {
        *record.mutable_forward() = done.forward();
        record.mutable_forward()->set_weight_version(done.weight_version());
        record.mutable_forward()->set_optimizer_step(done.optimizer_step());
        PayloadDigest digest;
        for (const v1::LogprobItem& item : op->logprobs) digest.Add(item);
        digest.Fill(&op->logprobs_commit);
        break;
      }
      case v1::RankDone::kBackward:
        *record.mutable_backward() = done.backward();
        record.mutable_backward()->set_weight_version(done.weight_version());
        record.mutable_backward()->set_optimizer_step(done.optimizer_step());
        break;
      case v1::RankDone::kOptimStep:
        *record.mutable_optim_step() = done.optim_step();
        break;
      case v1::RankDone::kZeroGrad:
        *record.mutable_zero_grad() = done.zero_grad();
        break;
      case v1::RankDone::kSnapshot:
        *record.mutable_snapshot() = done.snapshot();
        record.mutable_snapshot()->set_weight_version(done.weight_version());
        record.mutable_snapshot()->set_optimizer_step(done.optimizer_step());
        break;
      case v1::RankDone::kRelease:
        *record.mutable_release() = done.release();
        break;
      default:
        break;
    }
    if (op->kind == v1::OPERATION_KIND_UNLOAD_MODEL) {
      record.mutable_unload();
      if (auto handle = FindHandle(op->model_id); handle.ok()) {
        (*handle)->unloaded = true;
        Fence(**handle, Unloaded());
      }
      activations_.clear();
    } else if (op->kind == v1::OPERATION_KIND_UNSPECIFIED) {
      record.set_queue_position(static_cast<int32_t>(done.dropped_ops()));
    }
    Finish(op, v1::OPERATION_STATE_DONE, absl::OkStatus());
  }
  if (stepped) Changed();
  work_.SignalAll();
}

void Job::Finish(const OperationPtr& op, v1::OperationState state,
                 const absl::Status& error) {
  op->ended = Clock::now();
  op->request = OperationRequest();
  const bool done = state == v1::OPERATION_STATE_DONE;
  if (auto it = activations_.find(op->activation_id);
      it != activations_.end() && op->kind != v1::OPERATION_KIND_UNSPECIFIED) {
    Activation& activation = it->second;
    --activation.pins;
    activation.delivered = op->ended;
    const bool forward = op->kind == v1::OPERATION_KIND_FORWARD;
    if (forward && done) {
      op->record.mutable_forward()->set_activation_id(op->activation_id);
      *op->record.mutable_forward()->mutable_expires() =
          google::protobuf::util::TimeUtil::NanosecondsToTimestamp(
              absl::ToUnixNanos(absl::Now()) +
              std::chrono::nanoseconds(activation.ttl).count());
    } else if (forward || done) {
      activations_.erase(it);
    }
  }
  if (!done) {
    *op->record.mutable_error() = ToOperationError(error);
    std::vector<v1::LogprobItem>().swap(op->logprobs);
  }
  op->record.set_state(state);
  *op->record.mutable_end_time() = WallNow();
  op->changed.SignalAll();
  if (op->kind == v1::OPERATION_KIND_UNSPECIFIED) return;
  results_.push_back(op);
  environment_->sessions->Publish(op->session_id, op->record);
  Measure(op);
}

void Job::FailOperations() {
  absl::Status error = absl::OkStatus();
  if (job_.has_error()) {
    error = FromOperationError(job_.error());
  } else {
    error = stopping_
                ? ErrorBuilder(absl::StatusCode::kUnavailable, "SERVER_STOPPED")
                      .Server()
                      .Message("The server stopped before the operation ended.")
                : ErrorBuilder(absl::StatusCode::kAborted, "JOB_DELETED")
                      .With("job_id", id_)
                      .Message(
                          "The job was deleted before the operation "
                          "ended.");
  }
  for (auto& [id, op] : in_flight_) {
    Finish(op, v1::OPERATION_STATE_FAILED, error);
  }
  in_flight_.clear();
  for (const OperationPtr& op : control_) {
    Finish(op, v1::OPERATION_STATE_FAILED, error);
  }
  control_.clear();
  for (auto& [id, handle] : handles_) Fence(*handle, error);
  activations_.clear();
}

void Job::Measure(const OperationPtr& op) {
  const auto seconds = [](Clock::duration d) {
    return std::chrono::duration<double>(d).count();
  };
  const v1::Operation& record = op->record;
  const bool ok = record.state() == v1::OPERATION_STATE_DONE;
  const bool ran = op->started != Clock::time_point();
  std::string outcome = "ok";
  if (record.state() == v1::OPERATION_STATE_CANCELLED) {
    outcome = "cancelled";
  } else if (!ok) {
    outcome =
        record.error().category() == "USER" ? "user_error" : "server_error";
  }
  Metrics::OperationMeasure measure;
  measure.job_id = id_;
  measure.op = KindName(op->kind);
  measure.outcome = outcome;
  measure.queue_seconds = ran ? seconds(op->started - op->submitted) : 0;
  measure.execution_seconds = ran ? seconds(op->ended - op->started) : 0;
  measure.tokens = ok ? op->tokens : 0;
  measure.reason = record.error().reason();
  environment_->metrics->CountOperation(measure);
  if (ok && record.has_optim_step()) {
    environment_->metrics->SetStep(
        id_, record.optim_step().optimizer_step(),
        record.optim_step().grad_norm(),
        record.optim_step().effective().learning_rate());
  }
  if (ok && record.has_forward()) {
    auto loss = record.forward().metrics().find("loss:sum");
    if (loss != record.forward().metrics().end() &&
        op->kind == v1::OPERATION_KIND_FORWARD_BACKWARD) {
      environment_->metrics->SetLoss(id_, loss->second);
    }
  }
}

}  // namespace gradwire
