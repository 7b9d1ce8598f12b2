// SPDX-License-Identifier: Apache-2.0
// Bytes by class, before the first allocation; and how many layers of a
// micro-batch keep their activations. Pure functions.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "model/config.h"
#include "trainer/trainer.h"

namespace gradwire {

// Most targets, and most of top_k, a position.
constexpr int64_t kMaxTargets = 64;

// Activations of one micro-batch of `tokens` that stand in `rows` rows
// (pack.h), in bytes, alignment included.
struct ActivationBytes {
  int64_t layer_input = 0;  // of one layer: what recompute starts from
  int64_t layer_rest = 0;   // of one layer: what recompute makes again
  int64_t fixed = 0;        // residual after the last layer, head statistics
  int64_t Kept(int64_t layers, int64_t full) const {
    return fixed + layers * layer_input + full * layer_rest;
  }
};
ActivationBytes ActivationBytesOf(const ModelConfig& config,
                                  Precision precision, int64_t tokens,
                                  int64_t rows);

// How many of the layers are kept in full when `free_bytes` are left: all,
// some, none (0: inputs only), or -1 if not even the inputs fit.
int64_t FullLayers(const ActivationBytes& bytes, int64_t layers,
                   int64_t free_bytes);

struct MemoryInputs {
  int64_t flat_elements = 0;  // that this rank holds
  int64_t squares = 0;        // sums of squares of the gradient
  // For units gathered from other ranks, and gradients on their way to them.
  int64_t gathered_bytes = 0;
  // Of the kernels, for the largest micro-batch, by number of tokens.
  int64_t kernel_workspace_bytes = 0;
  // That the head keeps of a micro-batch of the usual size.
  int64_t head_kept_bytes = 0;
  int64_t available_bytes = 0;
};

// Tokens that a micro-batch holds unless a datum is longer.
int64_t UsualMicroBatch(const TrainerOptions& options);

// The largest micro-batch: what MemoryInputs must be computed for.
int64_t PlannedMicroBatch(const ModelConfig& config,
                          const TrainerOptions& options);

// Buffers of one layer and its surroundings, for `tokens`, kernels' own
// excluded.
int64_t ScratchBytes(const ModelConfig& config, Precision precision,
                     int64_t tokens);

// Errors: INVALID_ARGUMENT SEQUENCE_TOO_LONG (max_context beyond the model's);
// RESOURCE_EXHAUSTED MEMORY_PLAN_EXCEEDED with the numbers.
absl::StatusOr<MemoryPlan> PlanMemory(const ModelConfig& config,
                                      const TrainerOptions& options,
                                      const MemoryInputs& inputs);

}  // namespace gradwire
