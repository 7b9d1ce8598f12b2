// SPDX-License-Identifier: Apache-2.0
// One sequenced operation: its request until it has been sent to the ranks,
// its state, its results.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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
  // Of the datums of the call, or of those behind activation_id.
  std::vector<DatumShape> shapes;
  // Of several ranks: who has which of them.
  std::vector<int> rank_of;

  OperationRequest request;  // empty once sent
  v1::Operation record;      // state, error, result, times

  // Results of forward and forward_backward, in the order of datums.
  std::vector<v1::LogprobItem> logprobs;
  v1::CommitRecord logprobs_commit;  // once done
  bool acknowledged = false;
  // The arrays have been dropped.
  bool expired = false;

  Clock::time_point submitted, started, ended;
  // Signalled at every change of record and logprobs.
  absl::CondVar changed;

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

}  // namespace gradwire
