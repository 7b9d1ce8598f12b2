// SPDX-License-Identifier: Apache-2.0
// What the ranks answer, and what becomes of operations with it.
#include <algorithm>

#include "base/error.h"
#include "google/protobuf/util/time_util.h"
#include "server/grpc_status.h"
#include "server/job.h"
#include "server/job_errors.h"
#include "server/payload_digest.h"
#include "server/result_digest.h"

namespace gradwire {

void Job::OnLogprobs(GroupEvent& event) {
  for (Flight& flight : in_flight_) {
    if (flight.id != event.command_id) continue;
    std::vector<v1::LogprobItem>& items =
        flight.purpose == Flight::kReplay ? flight.items : flight.op->logprobs;
    for (v1::LogprobItem& item : event.logprobs) {
      // Bit for bit those that are there from the run before.
      if (flight.known_items > 0) {
        --flight.known_items;
      } else {
        items.push_back(std::move(item));
      }
    }
    if (flight.purpose == Flight::kOperation) flight.op->changed.SignalAll();
  }
}

void Job::OnDone(const GroupEvent& event) {
  const v1::RankDone& done = event.done;
  if (OnWritten(done)) {
    work_.SignalAll();
    return;
  }
  const auto found = std::find_if(
      in_flight_.begin(), in_flight_.end(),
      [&](const Flight& flight) { return flight.id == done.command_id(); });
  if (found == in_flight_.end()) return;
  const Flight flight = std::move(*found);
  in_flight_.erase(found);
  if (flight.saves()) SaveOf(flight) = {};
  // While it recovers, a job is where its log says.
  const bool replays =
      flight.purpose == Flight::kReplay || flight.purpose == Flight::kLoadPoint;
  // And a save is of where it was when that began.
  const bool tells = !replays && !flight.saves();
  const bool stepped = tells && done.optimizer_step() != job_.optimizer_step();
  if (tells) {
    job_.set_weight_version(done.weight_version());
    job_.set_optimizer_step(done.optimizer_step());
    environment_->metrics->SetStep(id_, done.optimizer_step());
  }
  *job_.mutable_memory_use() = done.memory_use();
  *job_.mutable_memory_use_max() = event.most_memory;
  environment_->metrics->SetMemoryUse(id_, done.memory_use());
  if (world_size() > 1) {
    environment_->metrics->CountCollectives(id_, job_.collective_use(),
                                            event.collectives);
    *job_.mutable_collective_use() = event.collectives;
  }
  switch (flight.purpose) {
    case Flight::kOperation:
      // What ends beside a save that is interrupted again and again does not
      // bring the job on.
      if (!SavesAgain()) failures_in_row_ = 0;
      OnOperationDone(flight, done);
      break;
    case Flight::kRelease:
      break;
    case Flight::kReplay:
      OnReplayed(flight, done);
      break;
    case Flight::kLoadPoint:
      OnPointLoaded(flight, done);
      break;
    case Flight::kSavePoint:
      OnPointSaved(flight, done);
      break;
  }
  if (stepped) Changed();
  work_.SignalAll();
}

void Job::OnOperationDone(const Flight& flight, const v1::RankDone& done) {
  const OperationPtr& op = flight.op;
  op->ran = true;
  op->tainted = done.tainted();
  op->dropped_ops = done.dropped_ops();
  // A save that has ended is not run again.
  if (!flight.saves()) {
    seconds_since_point_ +=
        std::chrono::duration<double>(Clock::now() - op->started).count();
  }
  if (done.has_error() && !FindSaved(flight, done)) {
    Finish(op, v1::OPERATION_STATE_FAILED, FromOperationError(done.error()));
    return;
  }
  op->state_digest = ResultDigest(done, op->logprobs);
  op->kernels = kernels_;
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
      ++steps_since_point_;
      break;
    case v1::RankDone::kZeroGrad:
      *record.mutable_zero_grad() = done.zero_grad();
      break;
    case v1::RankDone::kSnapshot:
      *record.mutable_snapshot() = done.snapshot();
      break;
    case v1::RankDone::kSaveState:
      *record.mutable_save_state() = done.save_state();
      break;
    case v1::RankDone::kLoadState:
      *record.mutable_load_state() = done.load_state();
      record.mutable_load_state()->set_weight_version(done.weight_version());
      record.mutable_load_state()->set_optimizer_step(done.optimizer_step());
      record.mutable_load_state()->set_dropped_ops(done.dropped_ops());
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
  }
  Finish(op, v1::OPERATION_STATE_DONE, absl::OkStatus());
}

void Job::Finish(const OperationPtr& op, v1::OperationState state,
                 const absl::Status& error) {
  op->ended = Clock::now();
  // Else it is still being written to the log.
  if (!op->logging) op->request = OperationRequest();
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
    } else {
      activation.kept = true;
    }
  }
  if (!done) {
    *op->record.mutable_error() = ToOperationError(error);
    std::vector<v1::LogprobItem>().swap(op->logprobs);
  }
  *op->record.mutable_end_time() = WallNow();
  op->final_state = state;
  op->weight_version = job_.weight_version();
  op->optimizer_step = job_.optimizer_step();
  if (op->handle != 0 && op->kind == v1::OPERATION_KIND_UNSPECIFIED && !done &&
      current_ != nullptr && current_->reset == op) {
    // A handle that has not begun is none.
    current_->fenced = true;
    current_ = nullptr;
  }
  if (op->handle == 0) {
    // No handle has asked for it.
    op->record.set_state(state);
    op->changed.SignalAll();
    return;
  }
  if (ChangesState(*op)) history_.push_back(op);
  ended_.push_back(op);
  commit_work_.Signal();
}

void Job::FailOperations() {
  const absl::Status error =
      job_.has_error()
          ? FromOperationError(job_.error())
          : ErrorBuilder(absl::StatusCode::kAborted, "JOB_DELETED")
                .With("job_id", id_)
                .Message("The job was deleted before the operation ended.");
  for (const Flight& flight : in_flight_) {
    if (flight.purpose == Flight::kOperation) {
      Finish(flight.op, v1::OPERATION_STATE_FAILED, error);
    }
  }
  in_flight_.clear();
  for (const Save* save : {&state_save_, &snapshot_save_}) {
    if (save->flight.has_value() &&
        save->flight->purpose == Flight::kOperation &&
        !save->flight->op->Ended()) {
      Finish(save->flight->op, v1::OPERATION_STATE_FAILED, error);
    }
  }
  DropSaves();
  for (std::deque<OperationPtr>* queue : {&again_, &control_}) {
    for (const OperationPtr& op : *queue) {
      Finish(op, v1::OPERATION_STATE_FAILED, error);
    }
    queue->clear();
  }
  for (auto& [id, handle] : handles_) Fence(*handle, error);
  activations_.clear();
  save_after_ = nullptr;
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
  if (record.has_backward() ||
      op->kind == v1::OPERATION_KIND_FORWARD_BACKWARD) {
    const auto& metrics = record.has_backward() ? record.backward().metrics()
                                                : record.forward().metrics();
    const auto weighted = metrics.find("tokens:sum");
    measure.trained =
        weighted == metrics.end() ? 0 : static_cast<int64_t>(weighted->second);
  }
  measure.reason = record.error().reason();
  environment_->metrics->CountOperation(measure);
  if (ok && record.has_optim_step()) {
    environment_->metrics->SetGradNorm(
        id_, record.optim_step().grad_norm(),
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
