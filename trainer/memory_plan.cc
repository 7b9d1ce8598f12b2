// SPDX-License-Identifier: Apache-2.0
#include "trainer/memory_plan.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "device/arena.h"

namespace gradwire {
namespace {

constexpr int64_t kDefaultMicroBatch = 1024;
constexpr int64_t kDefaultContext = 8192;
// Left to the rest of the machine when the planner chooses.
constexpr double kShare = 0.9;
// Full micro-batches that the planner keeps room for.
constexpr int64_t kRetainedMicroBatches = 4;

int64_t Bytes(int64_t elements, int64_t element_bytes) {
  return Arena::AlignedBytes(elements * element_bytes);
}

int64_t ActBytes(Precision precision) {
  return precision == Precision::kF32 ? 4 : 2;
}

int64_t Context(const ModelConfig& config, const TrainerOptions& options) {
  if (options.max_context > 0) return options.max_context;
  return std::min(config.max_positions, kDefaultContext);
}

}  // namespace

ActivationBytes ActivationBytesOf(const ModelConfig& config,
                                  Precision precision, int64_t tokens,
                                  int64_t rows) {
  const int64_t act = ActBytes(precision);
  ActivationBytes bytes;
  bytes.layer_input = Bytes(rows * config.hidden, act);
  bytes.layer_rest = 2 * Bytes(rows, 4) + Bytes(rows * config.QkvWidth(), act) +
                     Bytes(rows * config.AttentionWidth(), act) +
                     Bytes(tokens * config.heads, 4) +
                     Bytes(rows * config.hidden, act) +
                     Bytes(rows * 2 * config.ffn, act);
  bytes.fixed = Bytes(rows * config.hidden, act) + Bytes(rows, 4);
  return bytes;
}

int64_t FullLayers(const ActivationBytes& bytes, int64_t layers,
                   int64_t free_bytes) {
  const int64_t left = free_bytes - bytes.Kept(layers, 0);
  if (left < 0) return -1;
  return std::min(layers, left / bytes.layer_rest);
}

int64_t UsualMicroBatch(const TrainerOptions& options) {
  return options.micro_batch_tokens > 0 ? options.micro_batch_tokens
                                        : kDefaultMicroBatch;
}

int64_t PlannedMicroBatch(const ModelConfig& config,
                          const TrainerOptions& options) {
  return std::max(UsualMicroBatch(options), Context(config, options));
}

int64_t ScratchBytes(const ModelConfig& config, Precision precision,
                     int64_t tokens) {
  const int64_t act = ActBytes(precision);
  const ActivationBytes layer =
      ActivationBytesOf(config, precision, tokens, tokens);
  return layer.layer_rest + 2 * layer.layer_input + layer.fixed +
         6 * Bytes(tokens * config.hidden, act) +
         4 * Bytes(tokens * config.QkvWidth(), act) +
         3 * Bytes(tokens * config.AttentionWidth(), act) +
         2 * Bytes(tokens * config.ffn, act) + 7 * Bytes(tokens, 4) +
         7 * Bytes(tokens * kMaxTargets, 4) +
         2 * Bytes(tokens * config.head_dim, 4);
}

absl::StatusOr<MemoryPlan> PlanMemory(const ModelConfig& config,
                                      const TrainerOptions& options,
                                      const MemoryInputs& inputs) {
  if (options.max_context > config.max_positions) {
    return ErrorBuilder(absl::StatusCode::kInvalidArgument, "SEQUENCE_TOO_LONG")
        .With("field", "max_context_length")
        .With("value", options.max_context)
        .With("limit", config.max_positions)
        .Message("max_context_length is above the model's " +
                 std::to_string(config.max_positions) + " positions");
  }
  MemoryPlan plan;
  plan.max_context = Context(config, options);
  plan.micro_batch_tokens = UsualMicroBatch(options);
  const int64_t largest = PlannedMicroBatch(config, options);
  const int64_t n = inputs.flat_elements;
  plan.available = inputs.available_bytes;
  // In bf16 the lower half of the master is there to be trained.
  const bool split =
      options.precision == Precision::kBF16 && !options.forward_only;
  plan.weights =
      Bytes(n, ActBytes(options.precision)) + (split ? Bytes(n, 2) : 0);
  plan.gradients =
      options.forward_only ? 0 : Bytes(n, 4) + Bytes(inputs.squares, 8);
  // Two moments, and the two sums of their digest.
  plan.optimizer =
      options.forward_only
          ? 0
          : 2 * Bytes(n, ActBytes(options.moment_precision)) + Bytes(2, 8);
  plan.workspace = ScratchBytes(config, options.precision, largest) +
                   Arena::AlignedBytes(inputs.kernel_workspace_bytes) +
                   inputs.gathered_bytes;
  const int64_t rest =
      plan.weights + plan.gradients + plan.optimizer + plan.workspace;
  const ActivationBytes one =
      ActivationBytesOf(config, options.precision, largest, largest);
  const ActivationBytes usual =
      ActivationBytesOf(config, options.precision, plan.micro_batch_tokens,
                        plan.micro_batch_tokens);
  // A step needs at least the layers' inputs of its largest micro-batch.
  const int64_t least = one.Kept(config.layers, 0);
  const int64_t most = std::max(
      one.Kept(config.layers, config.layers),
      kRetainedMicroBatches * (usual.Kept(config.layers, config.layers) +
                               Arena::AlignedBytes(inputs.head_kept_bytes)));
  const int64_t left =
      static_cast<int64_t>(kShare * static_cast<double>(plan.available)) - rest;
  plan.activations = options.forward_only ? 0
                     : options.activation_bytes > 0
                         ? std::max(least, options.activation_bytes)
                         : std::max(least, std::min(most, left));
  plan.total = rest + plan.activations;
  plan.retained_tokens =
      plan.activations /
      std::max<int64_t>(1, usual.Kept(config.layers, config.layers)) *
      plan.micro_batch_tokens;
  if (plan.total > plan.available) {
    return ErrorBuilder(absl::StatusCode::kResourceExhausted,
                        "MEMORY_PLAN_EXCEEDED")
        .With("field", "memory")
        .With("value", plan.total)
        .With("limit", plan.available)
        .With("weights", plan.weights)
        .With("gradients", plan.gradients)
        .With("optimizer", plan.optimizer)
        .With("activations", plan.activations)
        .With("workspace", plan.workspace)
        .Message("the job needs " + std::to_string(plan.total) + " bytes and " +
                 std::to_string(plan.available) +
                 " are available; lower max_context_length, "
                 "micro_batch_tokens or activation_bytes, or take a smaller "
                 "model");
  }
  return plan;
}

}  // namespace gradwire
