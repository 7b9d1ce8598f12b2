// SPDX-License-Identifier: Apache-2.0
// The rank's side of a job: what is sent to it, in order, and what comes back.
#include <algorithm>

#include "base/error.h"
#include "base/log.h"
#include "base/status.h"
#include "google/protobuf/util/time_util.h"
#include "server/grpc_status.h"
#include "server/job.h"
#include "server/job_errors.h"
#include "server/payload_digest.h"

namespace gradwire {
namespace {

constexpr size_t kMaxInFlight = 2;
constexpr absl::Duration kTick = absl::Milliseconds(250);

}  // namespace

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
  *job_.mutable_memory_use() = done.memory_use();
  environment_->metrics->SetMemoryUse(id_, done.memory_use());
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
