// SPDX-License-Identifier: Apache-2.0
// One rank's work: executes the supervisor's commands in order. How it loads is
// in rank_load.cc.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gradwire/v1/rank.pb.h"
#include "server/rank_backend.h"
#include "server/rank_group_join.h"
#include "server/rank_link.h"
#include "trainer/trainer.h"

namespace gradwire {

// Thread rule: one thread at a time.
class RankWorker {
 public:
  // `device` and `threads` are MakeRankBackend's, `address` is where other
  // ranks reach this one; `link` outlives the worker.
  RankWorker(std::string device, int threads, std::string address,
             RankLink* link);

  // False: the rank is of no use and should exit (a load that failed).
  bool Execute(v1::RankCommand command);

 private:
  bool Load(const v1::RankLoad& load);
  absl::StatusOr<v1::Profile> WarmUp(const v1::RankLoad& load);
  void AdoptChoices(const v1::RankLoad& load);
  // Tells of what the kernels have decided since the last call.
  void TellChoices();
  absl::Status Forward(int64_t command_id, const v1::RankForward& command,
                       v1::RankDone& done);
  absl::Status Backward(const v1::RankBackward& command, v1::RankDone& done);
  absl::Status OptimStep(const v1::AdamParams& params, v1::RankDone& done);
  // Saves run beside what follows them: rank_saves.cc. What tells of the end of
  // this rank's part, with the versions that are saved.
  std::function<void(const absl::Status&)> AnswerOf(v1::RankDone done);
  // OK: its own thread answers.
  absl::Status BeginSave(const v1::RankSaveState& command,
                         const v1::RankDone& done);
  void BeginSnapshot(const v1::RankSaveSnapshot& command,
                     const v1::RankDone& done);
  absl::Status EndSave(const v1::RankEndSave& command, v1::RankDone& done);
  absl::Status EndSnapshot(const v1::RankEndSave& command, v1::RankDone& done);
  absl::Status LoadState(const v1::RankLoadState& command, v1::RankDone& done);
  absl::Status Run(const v1::RankCommand& command, v1::RankDone& done);

  absl::Status JoinGroup(const v1::RankLoad& load);
  // This rank's part of a call.
  struct Batch {
    ForwardOptions options;
    std::vector<TrainDatum> data;
    std::vector<bool> matrix;      // whether targets were [n, k]
    std::vector<int64_t> indices;  // of the datums, in the call
  };
  absl::Status DecodeBatch(const v1::RankForward& command, Batch& batch);
  absl::StatusOr<std::vector<std::vector<float>>> DecodeGradients(
      const v1::RankBackward& command);

  RankLink& link_;
  const std::string address_;
  const std::string device_;
  const int threads_;
  RankBackend backend_;  // made by Load
  int rank_ = 0;
  int world_ = 1;
  bool forward_only_ = false;
  // Something that this rank decided in an earlier process is not adopted.
  bool other_choices_ = false;
  RankGroupMember group_;
  std::unique_ptr<FileSystem> files_;  // as its server may change them
  std::unique_ptr<Trainer> trainer_;
  // What is being saved.
  v1::RankSaveState saving_;
  v1::RankSaveSnapshot saving_snapshot_;
  // Resident before the trainer's first allocation.
  int64_t other_bytes_ = 0;
  // Of the command that follows.
  std::vector<v1::DatumChunk> datums_;
  std::vector<v1::GradientChunk> gradients_;
};

}  // namespace gradwire
