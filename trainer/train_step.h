// SPDX-License-Identifier: Apache-2.0
// Forward and backward of one micro-batch: the only loop over layers, for every
// architecture.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "device/arena.h"
#include "device/device.h"
#include "kernels/kernels.h"
#include "model/block.h"
#include "model/config.h"
#include "model/param_table.h"
#include "sharding/layout.h"
#include "sharding/units.h"
#include "trainer/embedding_rows.h"
#include "trainer/memory_plan.h"
#include "trainer/pack.h"

namespace gradwire {

// Where a micro-batch's activations lie. `full_layers` of the first layers are
// whole; the others keep their inputs.
struct StoredActivations {
  std::vector<BlockActivations> layers;
  Tensor residual;  // act [rows, hidden], after the last layer
  Tensor lse;       // f32 [rows]
  Tensor head;      // LogprobHeadKeptBytes, or null
  int64_t full_layers = 0;
};

struct HeadResults {
  std::vector<float> logprobs;         // [tokens, k]
  std::vector<float> top_k_logprobs;   // [tokens, top_k]
  std::vector<int32_t> top_k_indices;  // [tokens, top_k]
};

// Thread rule: one thread at a time.
class TrainStep {
 public:
  // The units are the table's; `gradients` is null without training. All must
  // outlive the step. `scratch_bytes` as planned.
  struct Options {
    const ModelConfig* config;
    const ParamTable* table;
    const ShardLayout* layout;
    Precision precision;
    UnitWeights* weights;
    UnitGradients* gradients;
    // Null: the embedding's gradient is made as others are.
    EmbeddingRows* embedding_rows;
    // f64 [table->num_squares()], or null: not kept.
    Tensor squares;
    int64_t max_tokens;
    int64_t max_positions;
    int64_t scratch_bytes;
  };
  static absl::StatusOr<std::unique_ptr<TrainStep>> Create(
      const Options& options, Device& device, Kernels& kernels);

  // Lays `stored` out in `memory` of ActivationBytesOf(...).Kept(...) bytes and
  // `head_bytes` more: 0, or HeadKeptBytes of the rows.
  StoredActivations LayOut(char* memory, const PackedInputs& inputs,
                           int64_t full_layers, int64_t head_bytes) const;

  // Runs the forward; keeps activations in *stored unless it is null.
  absl::StatusOr<HeadResults> Forward(const PackedInputs& inputs, int64_t top_k,
                                      StoredActivations* stored);
  // The gradient of sum(d_logprobs * logprobs), [tokens, k]: added to the
  // gradients if `accumulate`, else written over whatever they hold. The
  // matrices' sums of squares are kept up. Overwrites parts of `stored`: a
  // forward is good for one backward.
  absl::Status Backward(const PackedInputs& inputs,
                        const StoredActivations& stored,
                        const std::vector<float>& d_logprobs, bool accumulate);

  // Takes part in a forward, and a backward, of other ranks for which this one
  // has no micro-batch: its gradient is zero.
  absl::Status JoinForward();
  absl::Status JoinBackward(bool accumulate);

  Stream& stream() { return *stream_; }
  int64_t PeakScratchBytes() const { return scratch_.peak_bytes(); }

 private:
  TrainStep(const Options& options, Device& device, Kernels& kernels);

  // Inputs on the device and buffers cut to the micro-batch's size.
  struct Bound {
    BlockContext context;
    BlockScratch scratch;
    BlockActivations spare;  // `rest` of a layer that is not kept
    Tensor tokens, targets;
    Tensor residual_a, residual_b, lse, rstd, normed, d_residual;
    Tensor logprobs, d_logprobs, top_k_logprobs, top_k_indices;
    Tensor head_workspace;
  };
  Bound Bind(const PackedInputs& inputs, int64_t top_k);
  // Values of a unit, and of the one that holds the head if the unit is the
  // last: the same, or the first if the head is the embedding.
  struct Held {
    int unit = 0;
    Tensor values, head;
  };
  // The order of units, for ranks with and without work: all of them gather and
  // reduce in it.
  void VisitForward(const std::function<void(const Held& weights)>& visit);
  struct HeldGradient {
    // Null values: of the embedding, whose rows are added by embedding_rows.
    UnitGradients::Place values, head;
    // Of the last unit, unless null: sends the gradient of the head's weight
    // while `make` makes it, elements of its unit. What the visit does not send
    // is sent after it.
    std::function<void(const ReducedGradients::MakePart& make)> send_head = {};
  };
  // `ids`: the tokens of this rank's rows.
  void VisitBackward(
      bool accumulate, const std::vector<int32_t>& ids,
      const std::function<void(const Held& weights, const HeldGradient& grad)>&
          visit);
  bool tied() const {
    return options_.table->head() == options_.table->embedding();
  }
  int last_unit() const { return options_.layout->num_units() - 1; }

  // What the gradient of the head's weight is made of, and of which head_rows_
  // rows each it has been made.
  struct HeadWeight {
    LogprobHead head;
    Kernels::LogprobHeadGrad grad;
    Kernels::WeightGrad d_weight;
    std::vector<bool> made;
  };
  // The head's backward, over the rows that have a gradient: -> scratch.hidden.
  void HeadBackward(const PackedInputs& inputs, const StoredActivations& stored,
                    const std::vector<float>& d_logprobs, const Held& weights,
                    const HeldGradient& grad, Bound& bound);
  // Makes what covers elements [begin, end) of the gradient of the head's unit.
  void MakeHeadWeight(HeadWeight& weight, int64_t begin, int64_t end);
  int head_unit() const { return tied() ? 0 : last_unit(); }
  // Zeroes what a backward only ever adds to in a unit's gradient, and the gaps
  // between parameters.
  void ClearSums(int unit, const Tensor& values);
  // Of `rows` rows of hidden values at `offset` of the flat vector, which a
  // unit's `values` hold.
  Tensor View(int unit, const Tensor& values, int64_t offset,
              int64_t rows) const;
  Tensor HeadView(const Tensor& values) const;
  // Those of a [vocab, hidden] matrix, or null.
  Tensor Squares(int64_t offset) const;

  const Options options_;
  Device& device_;
  Kernels& kernels_;
  // Of the gradient of the head's weight, that can be made alone; 0: none. On
  // every rank of a job alike.
  const int64_t head_rows_;
  std::unique_ptr<Stream> stream_;
  Arena scratch_;
  Tensor cos_, sin_;
  int64_t after_tables_ = 0;
};

// What the head can keep of a micro-batch, k targets a token; aligned.
int64_t HeadKeptBytes(const Kernels& kernels, const ModelConfig& config,
                      Precision precision, int64_t tokens, int64_t k);

// What the kernels need beside ScratchBytes, for up to `tokens`.
int64_t KernelWorkspaceBytes(const Kernels& kernels, const ModelConfig& config,
                             Precision precision, int64_t tokens,
                             int64_t max_positions);

}  // namespace gradwire
