// SPDX-License-Identifier: Apache-2.0
// A training step in this process, without a server around it. Its flags:
// --model, --precision, --threads, --sequences, --length, --shared, --prompt.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "device/cpu_device.h"
#include "kernels/kernels.h"
#include "trainer/trainer.h"

namespace gradwire {

class LocalStep {
 public:
  // Loads the model of the flags and draws a batch of random tokens, the same
  // in every run. `device`, of NewDevice, and `kernels` outlive it.
  static absl::StatusOr<LocalStep> Create(CpuDevice& device, Kernels& kernels);
  static std::unique_ptr<CpuDevice> NewDevice();
  // The activation type of --precision.
  static DType Act();

  // One forward and backward of cross entropy; the sum of the logprobs.
  absl::StatusOr<double> ForwardBackward();
  absl::Status OptimStep();
  Trainer& trainer() { return *trainer_; }

  // Of a forward and backward: 3 (2 N tokens + attention), where N counts the
  // weights of all products, the head's among them, and attention is causal.
  double UsefulFlops() const;

  int64_t sequences() const { return static_cast<int64_t>(batch_.size()); }
  int64_t length() const;
  int64_t tokens() const { return sequences() * length(); }

 private:
  explicit LocalStep(std::unique_ptr<Trainer> trainer);

  std::unique_ptr<Trainer> trainer_;
  std::vector<TrainDatum> batch_;
};

}  // namespace gradwire
