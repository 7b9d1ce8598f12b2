// SPDX-License-Identifier: Apache-2.0
// One rank's work: executes the supervisor's commands in order.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device/cpu_device.h"
#include "gradwire/v1/rank.pb.h"
#include "kernels/kernels.h"
#include "server/rank_link.h"
#include "trainer/trainer.h"

namespace gradwire {

// Thread rule: one thread at a time.
class RankWorker {
 public:
  // `link` outlives the worker.
  RankWorker(int threads, RankLink* link);

  // False: the rank is of no use and should exit (a load that failed).
  bool Execute(const v1::RankCommand& command);

 private:
  bool Load(const v1::RankLoad& load);
  absl::StatusOr<v1::Profile> WarmUp(const v1::RankLoad& load);
  absl::Status Forward(int64_t command_id, const v1::RankForward& command,
                       v1::RankDone& done);
  absl::Status Backward(const v1::RankBackward& command, v1::RankDone& done);
  absl::Status OptimStep(const v1::AdamParams& params, v1::RankDone& done);
  absl::Status SaveSnapshot(const v1::RankSaveSnapshot& command,
                            v1::RankDone& done);
  absl::Status Run(const v1::RankCommand& command, v1::RankDone& done);

  absl::StatusOr<std::unique_ptr<Collectives>> JoinGroup(
      const v1::RankLoad& load);

  RankLink& link_;
  CpuDevice device_;
  std::unique_ptr<Kernels> kernels_;
  int rank_ = 0;
  int world_ = 1;
  std::unique_ptr<Collectives> collectives_;
  std::unique_ptr<Trainer> trainer_;
  // Resident before the trainer's first allocation.
  int64_t other_bytes_ = 0;
  // Of the command that follows.
  std::vector<v1::DatumChunk> datums_;
  std::vector<v1::GradientChunk> gradients_;
};

}  // namespace gradwire
