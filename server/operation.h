// SPDX-License-Identifier: Apache-2.0
// One sequenced operation: its request until it has been sent to the ranks,
// its state, its results.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "gradwire/v1/operations.pb.h"
#include "gradwire/v1/rank.pb.h"

namespace gradwire {

using Clock = std::chrono::steady_clock;

// Number of positions, and of targets at each, of one datum.
struct DatumShape {
  int64_t n = 0;
  int64_t k = 1;
};

// What is sent to the ranks: batches of at most a few MiB, then the command.
struct OperationRequest {
  std::vector<v1::DatumChunk> datums;
  std::vector<v1::GradientChunk> gradients;
  v1::RankCommand command;
  int64_t datum_count = 0;
  int64_t tokens = 0;
  // Payload bytes; what the queue's bound counts.
  int64_t bytes = 0;
  // Of kind, header and payload: tells a repetition from another request.
  std::string digest;
};

// All but the identity is guarded by the job's mutex.
struct Operation {
  // Identity, constant once submitted.
  std::string op_id;
  std::string model_id;
  std::string session_id;
  int64_t seq = 0;
  v1::OperationKind kind = v1::OPERATION_KIND_UNSPECIFIED;
  std::string digest;
  int64_t bytes = 0;
  int64_t tokens = 0;
  // Of Backward and ReleaseActivations the id they name; of Forward with
  // retain, the id it makes.
  std::string activation_id;
  double retain_ttl_seconds = 0;  // 0: the server's default
  // Of the datums of the call, or of those behind activation_id.
  std::vector<DatumShape> shapes;
  // Of several ranks: who has which of them.
  std::vector<int> rank_of;

  OperationRequest request;  // empty once sent
  v1::Operation record;      // state, error, result, times

  // In the job's log. -1: not there.
  int64_t handle = 0;
  int64_t logged_at = -1;
  int64_t outcome_at = -1;
  // Its record is being written, at log_from or behind: nobody runs it yet, or
  // answers for it.
  bool logging = false;
  int64_t log_from = 0;
  absl::Status log_failure;

  // What it ended with, until the outcome is in the log and `record` may say
  // so.
  v1::OperationState final_state = v1::OPERATION_STATE_UNSPECIFIED;
  // As in JournalOutcome.
  std::string state_digest;
  std::string kernels;
  bool ran = false;
  bool tainted = false;
  int64_t weight_version = 0;
  int64_t optimizer_step = 0;
  int64_t dropped_ops = 0;
  int64_t closed_below = 0;

  // Ranks that died while they ran it.
  int crashes = 0;
  // It may have been run before, by a process that did not come to say so.
  bool is_again = false;
  // Of a save: there was something under its name when it was accepted.
  bool name_taken = false;
  // Of a save that may take the place of another checkpoint: its path.
  std::string replaces;
  // It loads a checkpoint: a LoadState, or the beginning of a handle with one.
  bool loads = false;
  // Arrays of an ended operation are in the log alone.
  bool stored = false;

  // Results of forward and forward_backward, in the order of datums.
  std::vector<v1::LogprobItem> logprobs;
  v1::CommitRecord logprobs_commit;  // once done
  bool acknowledged = false;
  // The arrays have been dropped.
  bool expired = false;
  // Nobody is told of what it gave any more; `record` still has it, for when it
  // is run again.
  bool result_expired = false;

  Clock::time_point submitted, started, ended;
  // Signalled at every change of record and logprobs.
  absl::CondVar changed;

  // Its end is decided, whether or not it is known yet.
  bool Ended() const { return final_state != v1::OPERATION_STATE_UNSPECIFIED; }
  bool Final() const {
    return record.state() == v1::OPERATION_STATE_DONE ||
           record.state() == v1::OPERATION_STATE_FAILED ||
           record.state() == v1::OPERATION_STATE_CANCELLED;
  }
};
using OperationPtr = std::shared_ptr<Operation>;

// The wall clock, for records.
google::protobuf::Timestamp WallNow();

// "forward_backward", for metrics and logs.
std::string KindName(v1::OperationKind kind);
// Whether it is written beside what follows it.
inline bool IsSave(v1::OperationKind kind) {
  return kind == v1::OPERATION_KIND_SAVE_STATE ||
         kind == v1::OPERATION_KIND_SAVE_SNAPSHOT;
}

}  // namespace gradwire
