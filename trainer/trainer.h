// SPDX-License-Identifier: Apache-2.0
// One rank's training state: weights, accumulator, Adam, retained activations.
// Knows steps, not RPCs. docs/training.md.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "checkpoint/safetensors.h"
#include "device/device.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "sharding/collectives.h"

namespace gradwire {

enum class Precision { kF32, kBF16 };

struct TrainerOptions {
  std::string model_directory;
  Precision precision = Precision::kF32;
  // Of Adam's m and v; bf16 is rounded stochastically.
  Precision moment_precision = Precision::kF32;
  // 0: chosen by the planner.
  int64_t max_context = 0;
  int64_t activation_bytes = 0;
  int64_t micro_batch_tokens = 0;
  // No gradients, optimizer or activations: Forward (without backward or
  // retain), Weight, Reset and Export are all that may be called.
  bool forward_only = false;
  // All ranks of the job, or null: this one alone. Outlives the trainer. All
  // ranks create their trainers and make the same calls in the same order, each
  // with its own datums.
  Collectives* collectives = nullptr;
  // Those among which the model is sharded, if not all of them: of a group of
  // several that each hold all of it (sharding/replicated_collectives.h).
  Collectives* shards = nullptr;
  // Of several ranks: gathered weights of a layer are dropped after its
  // forward, and gathered again for its backward. Otherwise all of the weights
  // that products compute with stay gathered between optimizer steps.
  bool reshard_after_forward = true;
  // Most tensor data of a file of a base snapshot.
  int64_t snapshot_shard_bytes = kShardBytes;
  // Ranks that share this machine's memory.
  int ranks_on_host = 1;
  // Where training checkpoints lie; null: the machine's files. Outlives the
  // trainer.
  FileSystem* files = nullptr;
};

// Bytes by class; made before the first allocation.
struct MemoryPlan {
  int64_t weights = 0, gradients = 0, optimizer = 0;
  int64_t activations = 0, workspace = 0;
  int64_t total = 0, available = 0;
  int64_t micro_batch_tokens = 0, max_context = 0, retained_tokens = 0;
};

// The most bytes of each class that have been in use at once; of weights,
// gradients and optimizer those that are there to be used.
struct MemoryUse {
  int64_t weights = 0, gradients = 0, optimizer = 0;
  int64_t activations = 0, workspace = 0;
};

// One sequence of a batch. n positions, k targets a position.
// Inputs that the loss does not use are empty.
struct TrainDatum {
  std::vector<int32_t> tokens;   // [n]
  std::vector<int32_t> targets;  // [n, k]
  int64_t k = 1;
  std::vector<float> weights;               // [n, k]
  std::vector<float> advantages, logprobs;  // [n, k] or [n]
  std::vector<float> clip_low, clip_high;   // [n]
  std::vector<float> sequence_ratio_mask;   // [n]
};

// How a call's datums are spread over ranks; empty with one rank. The rank's
// own datums are given in ascending order of their indices.
struct BatchShare {
  // Of all datums of the call: tokens, targets a position, rank.
  std::vector<int64_t> tokens, k;
  std::vector<int> rank_of;
};

struct LossSpec {
  std::string name = "cross_entropy";
  std::map<std::string, double> config;
};

// Logprobs of one datum, as they are ready.
struct DatumLogprobs {
  int64_t index = 0;  // of the datum in the call, whatever rank has it
  std::vector<float> logprobs;        // [n, k]
  std::vector<float> top_k_logprobs;  // [n, top_k]
  std::vector<int32_t> top_k_indices;
  // The next datum will take another micro-batch's time.
  bool last_of_micro_batch = false;
};
using LogprobSink = std::function<void(DatumLogprobs)>;

struct ForwardOptions {
  LossSpec loss;
  int32_t top_k = 0;
  bool backward = false;
  // Non-empty: retain under this id (not with backward).
  std::string activation_id;
  // Of several ranks: see BatchShare.
  BatchShare share;
};

struct ForwardOutcome {
  std::map<std::string, double> metrics;
  int64_t retained_layers = 0;
  bool retained = false;
};

struct BackwardOutcome {
  std::map<std::string, double> metrics;
  bool recomputed = false;
};

enum class GradientNormalization { kNone, kNumLossTokens, kNumSequences };
enum class GradientNormMetrics { kOff, kBasic, kDetailed };

struct OptimParams {
  double learning_rate = 1e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-12;
  double weight_decay = 0.0, grad_clip_norm = 0.0;
  GradientNormalization normalization = GradientNormalization::kNone;
  GradientNormMetrics norm_metrics = GradientNormMetrics::kBasic;
  int64_t expected_ops = -1;  // -1: not checked
};

struct OptimOutcome {
  double grad_norm = 0, clip_factor = 1;
  int64_t loss_tokens = 0, sequences = 0;
  bool skipped = false;
  std::map<std::string, double> metrics;
};

enum class SnapshotType { kBase, kDelta, kAuto };

struct SnapshotOptions {
  // .../<name>; its siblings are the job's other snapshots.
  std::string directory;
  SnapshotType type = SnapshotType::kBase;
  std::string parent;  // of a delta; "": the newest sibling
  double ttl_seconds = 0;
  // For the manifest.
  std::string job, operation, base_model;
};

struct ExportOutcome {
  std::string type;    // "base" or "delta"
  std::string parent;  // of a delta
  std::string reason;  // why it is of this type
  // Of the file with the weights; of several their sum, and the digest of their
  // digests.
  int64_t bytes = 0;
  std::string digest;
  std::string weight_id;  // of the full weights, see docs/delta.md
  int64_t optimizer_step = 0, weight_version = 0;
};

struct SavedState {
  int64_t bytes = 0;
  std::string digest;  // hexadecimal
  int64_t optimizer_step = 0, weight_version = 0;
};

// Thread rule: one thread at a time.
class Trainer {
 public:
  // Plans, reports the plan through `on_plan`, allocates, loads (progress
  // 0..1). Errors: those of ParseModelConfig and HfWeights;
  // MODEL_TENSOR_MISSING, MODEL_TENSOR_MISMATCH, MODEL_TENSOR_UNKNOWN;
  // RESOURCE_EXHAUSTED MEMORY_PLAN_EXCEEDED with the numbers.
  static absl::StatusOr<std::unique_ptr<Trainer>> Create(
      const TrainerOptions& options, Device& device, Kernels& kernels,
      const std::function<void(const MemoryPlan&)>& on_plan,
      const std::function<void(double)>& on_progress);
  virtual ~Trainer() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const MemoryPlan& plan() const = 0;
  virtual MemoryUse memory_use() const = 0;
  virtual int64_t num_parameters() const = 0;
  virtual int64_t weight_version() const = 0;
  virtual int64_t optimizer_step() const = 0;

  // The batch has been validated. Calls `sink` once for each datum of this
  // rank, micro-batch by micro-batch. With options.backward adds dL/dtheta to
  // the accumulator. Of several ranks, an error of one is an error of all;
  // metrics are those of the whole call.
  virtual absl::StatusOr<ForwardOutcome> Forward(
      const std::vector<TrainDatum>& data, const ForwardOptions& options,
      const LogprobSink& sink) = 0;

  // `d_logprobs[i]` is [n, k] of this rank's datum i, or empty for zero.
  // Consumes the id.
  // Errors: ACTIVATIONS_EXPIRED, ACTIVATIONS_STALE, SHAPE_MISMATCH,
  // NONFINITE_INPUT.
  virtual absl::StatusOr<BackwardOutcome> Backward(
      const std::string& activation_id,
      const std::vector<std::vector<float>>& d_logprobs, bool allow_stale) = 0;
  virtual void Release(const std::string& activation_id) = 0;

  // The first rank's error, on all of them: for what a rank finds before it
  // makes a call that the others wait in. Without others, `mine`.
  virtual absl::Status Agree(const absl::Status& mine) = 0;

  virtual absl::StatusOr<OptimOutcome> OptimStep(const OptimParams& params) = 0;
  virtual void ZeroGrad() = 0;
  // Work that failed half-way has left something in the accumulator, so that
  // the next OptimStep will refuse it; or let it be so (in a replay).
  virtual bool is_tainted() const = 0;
  virtual void Taint() = 0;
  // Drops gradients, counters, taint and activations; returns the number of
  // forward_backward operations whose gradients were dropped.
  virtual int64_t Reset() = 0;

  // Writes a snapshot (checkpoint/snapshot/writer.h): a Hugging Face directory
  // with safetensors (f32 for f32 jobs, bf16 for bf16 jobs), config.json and
  // the tokenizer's files, or the difference between that and an earlier one.
  // Atomic: `directory` appears complete or not at all. If the same operation
  // has made it before, nothing is done. The first rank writes what all hold,
  // and of several ranks it alone knows the outcome.
  // Errors: those of PlanSnapshot and SnapshotWriter.
  virtual absl::StatusOr<ExportOutcome> SaveSnapshot(
      const SnapshotOptions& options) = 0;
  // The same in parts, between which the training goes on, as with BeginSave;
  // a checkpoint may be saved meanwhile. Of several ranks that share a model,
  // BeginSnapshot gathers it, and waits where the first one's memory does not
  // hold it until enough is written. All errors but those of publishing come by
  // `written`.
  virtual void BeginSnapshot(
      const SnapshotOptions& options,
      std::function<void(const absl::Status&)> written) = 0;
  virtual absl::StatusOr<ExportOutcome> PublishSnapshot() = 0;
  virtual void AbandonSnapshot() = 0;
  // A base without a job.
  absl::StatusOr<ExportOutcome> Export(const std::string& directory) {
    SnapshotOptions options;
    options.directory = directory;
    return SaveSnapshot(options);
  }

  // Writes a training checkpoint (checkpoint/training_state.h): the float32
  // master, and once a step was taken the moments. Every rank writes what it
  // holds; `directory`, which all of them see, appears complete or not at all.
  // `attributes` are stored beside it. Gradients are left as they are.
  // Errors: CHECKPOINT_EXISTS; the file system's.
  virtual absl::StatusOr<SavedState> SaveState(
      const std::string& directory,
      const std::map<std::string, std::string>& attributes) = 0;
  // The same in parts, between which the training goes on. After BeginSave a
  // thread of its own writes what this rank holds as it is now, and calls
  // `written` at its end, which may be before this returns; OptimStep and
  // LoadState wait for what they change until it has been read. Once all ranks'
  // parts are written PublishSave makes the checkpoint; AbandonSave, also while
  // they are, removes what there is. One of them ends the save, and with it the
  // trainer's end does.
  // REQUIRES: none goes on before BeginSave; one does before the others.
  // `replaces`: as PendingState's.
  virtual absl::Status BeginSave(
      const std::string& directory, bool replaces,
      std::function<void(const absl::Status&)> written) = 0;
  virtual absl::StatusOr<SavedState> PublishSave(
      const std::map<std::string, std::string>& attributes) = 0;
  virtual void AbandonSave() = 0;
  // Weights and weight_version, with `optimizer` also moments and step (else
  // these begin at zero), of a checkpoint that any number of ranks has written.
  // Of a forward-only job weights alone, rounded as those of its model were.
  // Drops gradients and activations, as Reset, and returns the same.
  // Errors, after which all is as before: those of StateReader;
  // FAILED_PRECONDITION CHECKPOINT_INCOMPATIBLE (field, value, limit). After
  // another error is_valid() is false.
  virtual absl::StatusOr<int64_t> LoadState(const std::string& directory,
                                            bool optimizer) = 0;
  // False: a load has stopped half-way, and only another one is of use.
  virtual bool is_valid() const = 0;

  // 16 bytes over optimizer_step(), weight_version() and every bit of this
  // rank's float32 master and moments: the same state on as many ranks has the
  // same, and two states do not (kernels/state_digest.h). After a step it is
  // known; else it takes a pass over the state.
  virtual absl::StatusOr<std::string> StateDigest() = 0;

  // For tests: the accumulator's gradient, or the float32 master (of a
  // forward-only job what it computes with), of one parameter by Hugging Face
  // name.
  virtual absl::StatusOr<std::vector<float>> Gradient(
      const std::string& hf_name) = 0;
  virtual absl::StatusOr<std::vector<float>> Weight(
      const std::string& hf_name) = 0;
};

}  // namespace gradwire
