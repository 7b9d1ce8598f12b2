// SPDX-License-Identifier: Apache-2.0
// The handles of a job: who may train it, and who no longer may.
#include <array>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/status.h"
#include "server/checkpoint_catalogue.h"
#include "server/grpc_status.h"
#include "server/job.h"
#include "server/job_errors.h"

namespace gradwire {
namespace {

constexpr auto kInUse = std::chrono::seconds(30);

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

// Of the same session and model_seq_id.
absl::Status CheckRepetition(const v1::CreateModelRequest& first,
                             const v1::CreateModelRequest& again) {
  const auto fields = [](const v1::CreateModelRequest& request) {
    return std::array<std::pair<const char*, std::string>, 4>{
        {{"base_model", request.base_model().substr(0, 256)},
         {"mode", v1::ModelMode_Name(request.mode())},
         {"init_from.ref", request.init_from().ref()},
         {"init_from.optimizer",
          request.init_from().optimizer() ? "true" : "false"}}};
  };
  const auto had = fields(first), asked = fields(again);
  for (size_t i = 0; i < had.size(); ++i) {
    if (had[i] == asked[i]) continue;
    return Mismatch(had[i].first, asked[i].second, had[i].second)
        .Message(
            "The session has made another model under this model_seq_id; a "
            "repetition must be the same request, and a new model takes the "
            "next number.");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Job::Handle*> Job::FindHandle(
    const std::string& model_id) const {
  auto it = handles_.find(model_id);
  if (it != handles_.end()) return it->second.get();
  return ErrorBuilder(absl::StatusCode::kNotFound, "MODEL_NOT_FOUND")
      .With("field", "model_id")
      .With("value", model_id.substr(0, 128))
      .Message("There is no such model. CreateModel gives its id.");
}

absl::Status Job::Draining() const {
  environment_->metrics->CountRejected("draining");
  return ErrorBuilder(absl::StatusCode::kUnavailable, "SERVER_DRAINING")
      .Server()
      .With("retry_after_seconds", 1.0)
      .Message("The server is stopping. Try again when it is back.");
}

absl::Status Job::CheckHandle(const Handle& handle,
                              v1::OperationKind kind) const {
  if (environment_->draining) return Draining();
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
  const auto drained = handle.queue.Drain();
  if (!drained.empty()) handle.closed_below = handle.queue.next_seq();
  for (const OperationPtr& op : drained) {
    op->closed_below = handle.closed_below;
    Finish(op, v1::OPERATION_STATE_FAILED, error);
  }
}

Job::Handle* Job::FindAttached(const v1::CreateModelRequest& request) const {
  for (const auto& [id, handle] : handles_) {
    if (handle->session_id == request.session_id() &&
        handle->request.model_seq_id() == request.model_seq_id()) {
      return handle.get();
    }
  }
  return nullptr;
}

absl::Status Job::CheckAttach(const v1::CreateModelRequest& request) const {
  GW_RETURN_IF_ERROR(Unready());
  if (environment_->draining) return Draining();
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
  return absl::OkStatus();
}

const Job::Handle* Job::FirstBegun() const {
  const Handle* first = nullptr;
  for (const auto& [id, handle] : handles_) {
    const OperationPtr& reset = handle->reset;
    const bool has_ended = reset != nullptr && reset->Ended();
    if (has_ended && reset->final_state != v1::OPERATION_STATE_DONE) continue;
    // One that was taken over before it had begun.
    if (!has_ended && handle.get() != current_) continue;
    if (first == nullptr || handle->number < first->number) {
      first = handle.get();
    }
  }
  return first;
}

absl::Status Job::CheckInit(const v1::CreateModelRequest& request) const {
  const v1::InitFrom& init = request.init_from();
  if (init.ref().empty()) return absl::OkStatus();
  if (const Handle* first = FirstBegun(); first != nullptr) {
    const v1::InitFrom& had = first->request.init_from();
    const bool other = had.ref() != init.ref();
    if (!other && had.optimizer() == init.optimizer()) return absl::OkStatus();
    const std::string began = had.ref().empty() ? "base model" : had.ref();
    const auto with = [](bool optimizer) {
      return std::string(optimizer ? "true" : "false");
    };
    return Mismatch(other ? "init_from.ref" : "init_from.optimizer",
                    other ? init.ref() : with(init.optimizer()),
                    other ? began : with(had.optimizer()))
        .Message(
            "The job's weights have begun already, with the " +
            (other ? "state in limit"
                   : std::string("same checkpoint, but its optimizer's state "
                                 "as in limit")) +
            "; init_from is for a job's first model. Attach without it and "
            "use load_state, or create another job.");
  }
  if (spec_.forward_only() && init.optimizer()) {
    return Unsupported("init_from.optimizer", "true");
  }
  if (!spec_.forward_only() && request.mode() == v1::MODEL_MODE_FORWARD_ONLY) {
    return Mismatch("mode", "forward_only", "train")
        .Message(
            "A model that only answers forward, of other weights than the "
            "job's own, is a job of its own: create one that is "
            "forward-only.");
  }
  return absl::OkStatus();
}

bool Job::has_begun() const {
  absl::MutexLock lock(&mu_);
  return FirstBegun() != nullptr;
}

bool Job::BeginsWithLoad(const Handle& handle) {
  return !handle.attached && !handle.request.init_from().ref().empty();
}

OperationPtr Job::ResetOf(const Handle& handle) const {
  auto op = std::make_shared<Operation>();
  op->op_id = handle.model_id + ".0";
  op->model_id = handle.model_id;
  op->session_id = handle.session_id;
  op->handle = handle.number;
  op->submitted = Clock::now();
  op->record.set_op_id(op->op_id);
  op->record.set_model_id(handle.model_id);
  op->record.set_state(v1::OPERATION_STATE_QUEUED);
  *op->record.mutable_create_time() = WallNow();
  op->loads = BeginsWithLoad(handle);
  const v1::InitFrom& init = handle.request.init_from();
  const auto ref = ParseCatalogueRef(init.ref(), "init_from.ref");
  if (!op->loads || !ref.ok()) {
    op->request.command.mutable_reset();
    return op;
  }
  v1::RankLoadState& load = *op->request.command.mutable_load_state();
  load.set_directory(environment_->catalogue().DirectoryOf(*ref));
  load.set_path(init.ref());
  load.set_optimizer(init.optimizer());
  return op;
}

// Whether it succeeds decides what others attach to.
void Job::AwaitInit() {
  while (!stopping_ && current_ != nullptr) {
    const OperationPtr begins = current_->reset;
    if (begins == nullptr || !begins->loads || begins->Final()) return;
    begins->changed.Wait(&mu_);
  }
}

absl::StatusOr<Job::Handle*> Job::Attach(
    const v1::CreateModelRequest& request) {
  absl::MutexLock attach_lock(&attach_mu_);
  auto handle = std::make_unique<Handle>(environment_->queue);
  HandleRow row;
  {
    absl::MutexLock lock(&mu_);
    if (Handle* earlier = FindAttached(request); earlier != nullptr) {
      GW_RETURN_IF_ERROR(CheckRepetition(earlier->request, request));
      return earlier;
    }
    AwaitInit();
    GW_RETURN_IF_ERROR(CheckAttach(request));
    GW_RETURN_IF_ERROR(CheckInit(request));
    handle->attached = FirstBegun() != nullptr;
  }
  if (!handle->attached && !request.init_from().ref().empty()) {
    GW_ASSIGN_OR_RETURN(
        const CheckpointRef ref,
        ParseCatalogueRef(request.init_from().ref(), "init_from.ref"));
    GW_RETURN_IF_ERROR(environment_->catalogue().Get(ref).status());
  }
  {
    absl::MutexLock lock(&mu_);
    handle->number = ++num_handles_;
  }
  handle->model_id = id_ + "." + RandomHex(8);
  handle->session_id = request.session_id();
  handle->request = request;
  handle->reset = ResetOf(*handle);
  row.number = handle->number;
  row.model_id = handle->model_id;
  row.session_id = handle->session_id;
  row.request = request.SerializeAsString();
  row.attached = handle->attached;
  if (const absl::Status room = environment_->reserve->Hold();
      absl::IsResourceExhausted(room)) {
    return room;
  }
  // In this order: a handle that is known has taken over, a record without one
  // means nothing.
  GW_ASSIGN_OR_RETURN(handle->reset->logged_at, Log(handle->reset));
  GW_RETURN_IF_ERROR(environment_->metadata->AddHandle(id_, row));

  absl::MutexLock lock(&mu_);
  GW_RETURN_IF_ERROR(Unready());
  if (current_ != nullptr) {
    current_->fenced = true;
    Fence(*current_, Fenced());
  }
  current_ = handle.get();
  handles_[handle->model_id] = std::move(handle);
  activations_.clear();
  // Before anything of the new handle, after what the old one has running.
  control_.push_back(current_->reset);
  work_.SignalAll();
  return current_;
}

absl::StatusOr<v1::CreateModelResponse> Job::CreateModel(
    const v1::CreateModelRequest& request) {
  if (request.lora().rank() != 0) {
    return Unsupported("lora.rank", std::to_string(request.lora().rank()));
  }
  if (request.lora().ByteSizeLong() > 0) {
    return Unsupported("lora",
                       request.lora().ShortDebugString().substr(0, 128));
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
  GW_ASSIGN_OR_RETURN(const Handle* handle, Attach(request));
  absl::MutexLock lock(&mu_);
  const OperationPtr reset = handle->reset;
  // A server may have ended before it was logged, or executed; of a handle that
  // had been taken over by then, it never will be.
  if (reset == nullptr || (handle->fenced && !reset->Ended())) return Fenced();
  while (!reset->Final() && !stopping_) reset->changed.Wait(&mu_);
  if (!reset->Final()) return Draining();
  if (reset->record.state() != v1::OPERATION_STATE_DONE) {
    GW_RETURN_IF_ERROR(Unready());
    return FromOperationError(reset->record.error());
  }
  v1::CreateModelResponse response;
  response.set_model_id(handle->model_id);
  response.set_attached(handle->attached);
  response.set_weight_version(reset->weight_version);
  response.set_optimizer_step(reset->optimizer_step);
  response.set_dropped_forward_backward_ops(reset->dropped_ops);
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

}  // namespace gradwire
