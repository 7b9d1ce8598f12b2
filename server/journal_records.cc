// SPDX-License-Identifier: Apache-2.0
#include "server/journal_records.h"

namespace gradwire {

v1::JournalOutcome OutcomeOf(const Operation& op, bool with_arrays) {
  v1::JournalOutcome outcome;
  *outcome.mutable_operation() = op.record;
  outcome.mutable_operation()->set_state(op.final_state);
  outcome.mutable_operation()->clear_queue_position();
  outcome.set_request_digest(op.digest);
  outcome.set_digest(op.state_digest);
  outcome.set_kernels(op.kernels);
  outcome.set_ran(op.ran);
  outcome.set_tainted(op.tainted);
  outcome.set_weight_version(op.weight_version);
  outcome.set_optimizer_step(op.optimizer_step);
  outcome.set_dropped_ops(op.dropped_ops);
  outcome.set_closed_below(op.closed_below);
  outcome.set_activation_id(op.activation_id);
  *outcome.mutable_logprobs_commit() = op.logprobs_commit;
  if (op.kind == v1::OPERATION_KIND_BACKWARD) {
    for (const DatumShape& shape : op.shapes) {
      outcome.add_shape_n(shape.n);
      outcome.add_shape_k(shape.k);
    }
  }
  if (with_arrays) {
    for (const v1::LogprobItem& item : op.logprobs) {
      *outcome.add_logprobs() = item;
    }
  }
  return outcome;
}

void TakeOp(const v1::JournalOp& logged, Operation& op) {
  op.kind = logged.kind();
  op.activation_id = logged.activation_id();
  op.retain_ttl_seconds = logged.retain_ttl_seconds();
  op.digest = logged.request_digest();
  op.tokens = logged.tokens();
  op.bytes = logged.bytes();
  op.shapes.clear();
  for (int i = 0; i < logged.shape_n_size(); ++i) {
    op.shapes.push_back({logged.shape_n(i), logged.shape_k(i)});
  }
  op.rank_of.assign(logged.rank_of().begin(), logged.rank_of().end());
  op.is_again = true;
  op.name_taken = logged.name_taken();
  const v1::RankSaveState& save = logged.command().save_state();
  if (save.replaces()) op.replaces = save.path();
  op.loads = logged.command().has_load_state();
  if (op.Ended()) return;
  op.record.set_kind(logged.kind());
  op.record.set_state(v1::OPERATION_STATE_QUEUED);
  *op.record.mutable_create_time() = logged.create_time();
}

void TakeOutcome(v1::JournalOutcome& outcome, Operation& op) {
  op.record.Swap(outcome.mutable_operation());
  op.final_state = op.record.state();
  op.kind = op.record.kind();
  op.digest = outcome.request_digest();
  op.state_digest = outcome.digest();
  op.kernels = outcome.kernels();
  op.ran = outcome.ran();
  op.tainted = outcome.tainted();
  op.weight_version = outcome.weight_version();
  op.optimizer_step = outcome.optimizer_step();
  op.dropped_ops = outcome.dropped_ops();
  op.closed_below = outcome.closed_below();
  op.activation_id = outcome.activation_id();
  op.logprobs_commit = outcome.logprobs_commit();
  if (op.shapes.empty()) {
    for (int i = 0; i < outcome.shape_n_size(); ++i) {
      op.shapes.push_back({outcome.shape_n(i), outcome.shape_k(i)});
    }
  }
  op.ended = Clock::now();
}

bool HasArrays(const Operation& op) {
  return op.final_state == v1::OPERATION_STATE_DONE &&
         (op.kind == v1::OPERATION_KIND_FORWARD ||
          op.kind == v1::OPERATION_KIND_FORWARD_BACKWARD);
}

}  // namespace gradwire
