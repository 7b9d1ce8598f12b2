// SPDX-License-Identifier: Apache-2.0
// The trainer's state; trainer.cc makes it, trainer_forward.cc and
// trainer_backward.cc work with it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/safetensors.h"
#include "checkpoint/snapshot/writer.h"
#include "checkpoint/training_state.h"
#include "device/arena.h"
#include "device/prefault.h"
#include "model/param_table.h"
#include "sharding/gathered_weights.h"
#include "sharding/layout.h"
#include "sharding/units.h"
#include "trainer/activation_store.h"
#include "trainer/agreement.h"
#include "trainer/batch_plan.h"
#include "trainer/embedding_rows.h"
#include "trainer/flat_weights.h"
#include "trainer/losses.h"
#include "trainer/optimizer.h"
#include "trainer/pack.h"
#include "trainer/snapshot_save.h"
#include "trainer/state_save.h"
#include "trainer/train_step.h"
#include "trainer/trainer.h"

namespace gradwire {

// Activations of a micro-batch and their place in the activation memory.
struct Kept {
  int64_t offset = -1;  // -1: nowhere
  StoredActivations stored;
};

struct RetainedMicroBatch {
  MicroBatch plan;
  PackedInputs inputs;
  std::vector<float> logprobs;
  Kept kept;
};

struct Retained {
  int64_t weight_version = 0;
  std::vector<RetainedMicroBatch> batches;
  // Of the rank that has most.
  int64_t most_batches = 0;
  // The call's index of each datum of this rank.
  std::vector<int64_t> index_of;
};

class TrainerImpl : public Trainer {
 public:
  TrainerImpl(const TrainerOptions& options, std::string config_json,
              const ModelConfig& config, Device& device, Kernels& kernels)
      : options_(options),
        config_json_(std::move(config_json)),
        config_(config),
        table_(config_),
        device_(device),
        kernels_(kernels),
        files_(options.files != nullptr ? *options.files : PosixFileSystem()),
        shards_(options.shards != nullptr ? options.shards
                                          : options.collectives),
        rank_(options.collectives == nullptr ? 0 : options.collectives->rank()),
        shard_rank_(shards_ == nullptr ? 0 : shards_->rank()),
        layout_(table_.unit_begins(), table_.num_elements(),
                shards_ == nullptr ? 1 : shards_->world()) {}

  absl::Status Plan();
  absl::Status Load(const HfWeights& files,
                    const std::function<void(double)>& on_progress);

  const ModelConfig& config() const override { return config_; }
  const ParamTable& table() const { return table_; }
  const MemoryPlan& plan() const override { return plan_; }
  MemoryUse memory_use() const override;
  int64_t num_parameters() const override { return table_.num_parameters(); }
  int64_t weight_version() const override { return weight_version_; }
  int64_t optimizer_step() const override { return optimizer_->step(); }

  absl::StatusOr<ForwardOutcome> Forward(const std::vector<TrainDatum>& data,
                                         const ForwardOptions& options,
                                         const LogprobSink& sink) override;
  absl::StatusOr<BackwardOutcome> Backward(
      const std::string& activation_id,
      const std::vector<std::vector<float>>& d_logprobs,
      bool allow_stale) override;
  void Release(const std::string& activation_id) override;
  absl::Status Agree(const absl::Status& mine) override {
    return agreement_->Agree(mine, nullptr);
  }
  absl::StatusOr<OptimOutcome> OptimStep(const OptimParams& params) override;
  void ZeroGrad() override;
  bool is_tainted() const override;
  void Taint() override;
  int64_t Reset() override;
  absl::StatusOr<ExportOutcome> SaveSnapshot(
      const SnapshotOptions& options) override;
  void BeginSnapshot(const SnapshotOptions& options,
                     std::function<void(const absl::Status&)> written) override;
  absl::StatusOr<ExportOutcome> PublishSnapshot() override;
  void AbandonSnapshot() override { snapshot_.reset(); }
  absl::StatusOr<SavedState> SaveState(
      const std::string& directory,
      const std::map<std::string, std::string>& attributes) override;
  absl::Status BeginSave(
      const std::string& directory, bool replaces,
      std::function<void(const absl::Status&)> written) override;
  absl::StatusOr<SavedState> PublishSave(
      const std::map<std::string, std::string>& attributes) override;
  void AbandonSave() override { saving_.reset(); }
  absl::StatusOr<int64_t> LoadState(const std::string& directory,
                                    bool optimizer) override;
  bool is_valid() const override { return valid_; }
  absl::StatusOr<std::string> StateDigest() override;
  absl::StatusOr<std::vector<float>> Gradient(
      const std::string& hf_name) override;
  absl::StatusOr<std::vector<float>> Weight(
      const std::string& hf_name) override;

 private:
  // Takes activation memory for a micro-batch, in full if it can be had, and of
  // the head as well if `spare_bytes` are left then. With `must` it evicts what
  // other operations have retained, the newest first (their backwards come
  // last), until at least the layers' inputs fit.
  Kept Take(const PackedInputs& inputs, int64_t spare_bytes, bool must);
  // What a micro-batch takes in full, without the head.
  int64_t FullBytes(int64_t tokens) const;
  void Give(Kept& kept);
  bool EvictOne();

  // What all micro-batches of a call have in common.
  struct Call {
    const std::vector<TrainDatum>& data;
    const ForwardOptions& options;
    const LogprobSink& sink;
    std::vector<int64_t> index_of;
    LossTotals totals;
  };
  absl::Status RunMicroBatch(Call& call, const MicroBatch& batch,
                             RetainedMicroBatch* retained, int64_t spare_bytes);
  // The call's indices of this rank's datums.
  std::vector<int64_t> IndexOf(const ForwardOptions& options,
                               size_t num_datums) const;
  // Whether there are no other ranks.
  bool alone() const { return world() == 1; }
  int world() const {
    return options_.collectives == nullptr ? 1 : options_.collectives->world();
  }
  UnitPlaces Places() const;
  // Ranks hand each other rows of the embedding's gradient. Not between groups
  // that each hold all of the model: gathers stay within one.
  bool adds_embedding_rows() const {
    return !alone() && shards_->world() == world();
  }
  EmbeddingRows::Options RowOptions() const;
  absl::Status CreateUnits();
  // A parameter whose pieces `read` reads on the ranks that hold them.
  absl::StatusOr<std::vector<float>> Collect(
      const ParamRow& row,
      const std::function<absl::Status(const ShardPiece&, float*)>& read);
  absl::Status CheckGradients(
      const Retained& retained,
      const std::vector<std::vector<float>>& d_logprobs) const;
  // Adds to the accumulator, or begins it.
  absl::Status RunBackward(const PackedInputs& inputs,
                           const StoredActivations& stored,
                           const std::vector<float>& d_logprobs);
  // Take part in other ranks' work without any of one's own.
  absl::Status JoinBackward();
  absl::Status JoinMicroBatch(bool backward);
  // The first rank's error, or the totals of all.
  absl::Status AgreeOn(const absl::Status& status, LossTotals& totals);
  // Errors: those of Backward that can be said before it begins.
  absl::StatusOr<Retained*> FindRetained(
      const std::string& activation_id,
      const std::vector<std::vector<float>>& d_logprobs, bool allow_stale);
  // `batch` is null if this rank only takes part; `index_of` are the call's
  // indices of its datums.
  absl::Status BackwardMicroBatch(
      RetainedMicroBatch* batch, const int64_t* index_of,
      const std::vector<std::vector<float>>& d_logprobs, bool stale,
      double& surrogate, bool& recomputed);
  // What a checkpoint's elements mean.
  std::string ModelDigest() const;
  // Calls `visit` with the pieces that this rank holds, in order, each cut into
  // parts that fit a buffer of the host's.
  absl::Status ForEachPart(
      const std::function<absl::Status(const ShardPiece& piece,
                                       const ShardPiece& part)>& visit) const;
  // OK if all ranks see the path, or none. Errors: FAILED_PRECONDITION
  // STATE_DIRECTORY_NOT_SHARED (value and limit: how many do, and should).
  absl::Status CheckShared(const std::string& path);
  // OK if what lies in `directory` has the same digest on all ranks. Errors:
  // ABORTED CHECKPOINT_REPLACED (checkpoint).
  absl::Status CheckSame(const std::string& directory,
                         const std::string& digest);
  // Waits until what is being saved of this unit has been read.
  void AwaitRead(int unit) const {
    if (saving_ != nullptr && saving_->part != nullptr) {
      saving_->part->AwaitRead(unit);
    }
    if (snapshot_ != nullptr) snapshot_->AwaitRead(unit);
  }
  SnapshotRequest RequestOf(const SnapshotOptions& options) const;
  // What is left of the host's memory when all of its ranks have touched their
  // state; of activations nobody knows how many there will be.
  int64_t SpareHostBytes() const;
  absl::Status CheckState(StateReader& reader, bool optimizer) const;
  absl::Status ReadState(StateReader& reader, bool optimizer);
  absl::StatusOr<FlatWeights> Weights() {
    return FlatWeights::Create(state_.weight, state_.low, device_, kernels_,
                               step_->stream());
  }

  const TrainerOptions options_;
  const std::string config_json_;
  const ModelConfig config_;
  const ParamTable table_;
  Device& device_;
  Kernels& kernels_;
  FileSystem& files_;
  Collectives* const shards_;  // null: one rank
  const int rank_;             // of all
  const int shard_rank_;       // of those among which the model is sharded
  const ShardLayout layout_;

  MemoryPlan plan_;
  Arena parameters_;
  // Of them; null: they come as they are touched.
  std::unique_ptr<Prefault> prefault_;
  std::unique_ptr<DeviceBuffer> activations_;
  std::unique_ptr<UnitWeights> unit_weights_;
  std::unique_ptr<UnitGradients> unit_gradients_;  // null: forward only
  std::unique_ptr<EmbeddingRows> embedding_rows_;  // null: not used
  int64_t gathered_bytes_ = 0;
  std::unique_ptr<RangeAllocator> ranges_;
  std::unique_ptr<TrainStep> step_;
  // Of all ranks; of those among which the model is sharded.
  std::unique_ptr<Agreement> agreement_, shard_agreement_;
  FlatState state_;
  std::unique_ptr<Optimizer> optimizer_;

  int64_t weight_version_ = 0;
  bool has_gradients_ = false;  // a backward has run
  bool has_moments_ = false;    // a step has written them, or a load
  bool valid_ = true;           // see is_valid
  // By id; `order_` from oldest to newest.
  std::map<std::string, Retained> retained_;
  std::vector<std::string> order_;

  // A checkpoint that is not published yet.
  struct Saving {
    std::unique_ptr<PendingState> pending;  // the first rank's
    int64_t optimizer_step = 0, weight_version = 0;
    // Null on a rank that writes nothing. Ends before what is pending is
    // removed.
    std::unique_ptr<StateSave> part;
  };
  // Ends before what it reads.
  std::unique_ptr<Saving> saving_;
  // Of the first rank, from BeginSnapshot on; ends before what it reads.
  std::unique_ptr<SnapshotSave> snapshot_;
};

// Whether a gradient is exactly zero.
bool AllZero(const std::vector<float>& values);

// OK, or NONFINITE_OUTPUT naming the first datum and position. `index_of`: the
// call's indices of the micro-batch's datums.
absl::Status CheckFinite(const PackedInputs& inputs, const int64_t* index_of,
                         const std::vector<float>& logprobs);

}  // namespace gradwire
