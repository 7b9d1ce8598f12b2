// SPDX-License-Identifier: Apache-2.0
// A training step in this process, without a server around it. Its flags:
// --model, --precision, --moments, --threads, --sequences, --length, --ragged,
// --shared, --prompt, --micro_batch, --max_context, --retained_tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "device/cpu_device.h"
#include "device/device.h"
#include "kernels/kernels.h"
#include "trainer/trainer.h"

namespace gradwire {

class LocalStep {
 public:
  // Loads the model of the flags and draws a batch of random tokens, the same
  // in every run. `device` and `kernels` outlive it.
  static absl::StatusOr<LocalStep> Create(Device& device, Kernels& kernels);
  // The host, with the threads of the flags.
  static std::unique_ptr<CpuDevice> NewDevice();
  // The activation type of --precision.
  static DType Act();
  // The last part of --model.
  static std::string Model();

  // One forward and backward of cross entropy; the sum of the logprobs.
  absl::StatusOr<double> ForwardBackward();
  // The same by a loss of the caller's: a forward that keeps its activations,
  // then the backward of d_logprobs that come from the host. An error if it had
  // to compute the forward again.
  absl::StatusOr<double> CustomStep();
  // What a custom loss takes where nothing is kept: a forward, then
  // ForwardBackward.
  absl::StatusOr<double> TwoForwardStep();
  absl::Status OptimStep();
  Trainer& trainer() { return *trainer_; }

  // Of a forward and backward: 3 (2 N tokens + attention), where N counts the
  // weights of all products, the head's among them, and attention is causal.
  double UsefulFlops() const;

  const std::vector<TrainDatum>& batch() const { return batch_; }
  int64_t sequences() const { return static_cast<int64_t>(batch_.size()); }
  int64_t length() const;  // of the flags: the most, if they are ragged
  int64_t tokens() const;
  // Of the plan's activations, what the head keeps if there is room; 0 if the
  // planner has chosen.
  int64_t HeadBytes(const Kernels& kernels) const;

 private:
  explicit LocalStep(std::unique_ptr<Trainer> trainer);
  // The logprobs of each datum.
  absl::StatusOr<std::vector<std::vector<float>>> Forward(
      const ForwardOptions& options);

  std::unique_ptr<Trainer> trainer_;
  std::vector<TrainDatum> batch_;
};

}  // namespace gradwire
