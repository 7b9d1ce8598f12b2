// SPDX-License-Identifier: Apache-2.0
// The gradient accumulator and AdamW over the flat vectors of one model, or
// over this rank's shards of them.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "device/device.h"
#include "kernels/kernels.h"
#include "kernels/state_digest.h"
#include "model/param_table.h"
#include "sharding/layout.h"
#include "trainer/agreement.h"
#include "trainer/trainer.h"

namespace gradwire {

// What this rank holds: vectors of layout.shard_elements(), the flat vectors
// with one rank.
struct FlatState {
  Tensor weight;    // act: the master in f32, its upper half in bf16
  Tensor low;       // i16: the lower half; null in f32 or without training
  Tensor gradient;  // f32, or null without training
  // f64 [table.num_squares()]: the gradient's sums of squares; null without
  // training. A backward keeps up those of matrices, a step makes the others.
  // Of several ranks: [SquareBlocks(layout.shard_elements())], a step makes all
  // of them.
  Tensor squares;
  Tensor m, v;    // f32 or bf16, or null without training
  Tensor digest;  // i64 [2], or null without training
};

// What lies in FlatState::gradient.
struct Accumulated {
  // The gradient has been written; until then what lies there is of no use, and
  // the gradient is zero.
  bool written = false;
  int64_t ops = 0;
  int64_t loss_tokens = 0;
  int64_t sequences = 0;
  // Work that failed half-way has left something behind.
  bool tainted = false;
};

// Thread rule: one thread at a time.
class Optimizer {
 public:
  // `rank`: this one's, of layout.world(), whose agreement it is. `whole`: all
  // is here, and a backward keeps up the sums of squares.
  struct Sharding {
    const ShardLayout& layout;
    int rank;
    Agreement& agreement;
    bool whole;
  };
  Optimizer(const ParamTable& table, const FlatState& state,
            const Sharding& sharding, Device& device, Kernels& kernels,
            Stream& stream)
      : table_(table),
        state_(state),
        sharding_(sharding),
        device_(device),
        kernels_(kernels),
        stream_(stream) {}

  Accumulated& accumulated() { return accumulated_; }
  // Applied steps.
  int64_t step() const { return step_; }

  // In order: expected_ops, taint; normalise; norm; clip; AdamW; clear. An
  // empty accumulator changes nothing (skipped). Every error but a failure of
  // the device leaves weights, moments and step as they were, and the
  // accumulator clear.
  // Errors: FAILED_PRECONDITION ACCUMULATION_MISMATCH, GRADIENTS_TAINTED,
  // NONFINITE_GRADIENT.
  // For each unit of the layout, in order, on all ranks: `before` it changes,
  // and `after`, when its weights here are those of the step, while later ones
  // are not.
  struct OnUnit {
    std::function<void(int unit)> before, after;
  };
  absl::StatusOr<OptimOutcome> Step(const OptimParams& params,
                                    const OnUnit& on_unit);

  void Clear();
  // Goes on after `step` applied steps, with the moments that are there. Clears
  // the accumulator.
  void Resume(int64_t step) {
    Clear();
    step_ = step;
    digest_.reset();
  }

  // Of master and moments here (kernels/state_digest.h). A step takes it in its
  // own pass; after Resume, or before the first one, it reads them all.
  absl::StatusOr<DigestSums> StateDigest();

 private:
  absl::Status CheckBefore(const OptimParams& params);
  Tensor SquaresOf(const ParamRow& row) const {
    return state_.squares.Rows(row.squares_offset,
                               row.squares_offset + row.num_squares);
  }
  // The gradient's sum of squares, of this rank's part.
  double SumOfSquares();
  // Its part in `group`, after SumOfSquares().
  double SumOfSquares(ParamGroup group);
  double SumOfSquares(const ParamRow& row);
  AdamWTensors TensorsOf(const ShardPiece& piece) const;
  void Update(const AdamWParams& params, const OnUnit& on_unit);
  absl::StatusOr<DigestSums> FetchDigest();

  const ParamTable& table_;
  const FlatState state_;
  const Sharding sharding_;
  Device& device_;
  Kernels& kernels_;
  Stream& stream_;
  Accumulated accumulated_;
  int64_t step_ = 0;
  std::optional<DigestSums> digest_;  // of what is there, if known
};

}  // namespace gradwire
