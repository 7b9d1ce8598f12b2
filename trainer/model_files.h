// SPDX-License-Identifier: Apache-2.0
// Between a Hugging Face directory and the flat vector of parameters.
#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/safetensors.h"
#include "device/device.h"
#include "device/tensor.h"
#include "model/config.h"
#include "model/param_table.h"
#include "sharding/layout.h"
#include "sharding/units.h"
#include "trainer/flat_weights.h"
#include "trainer/trainer.h"

namespace gradwire {

// That the files hold every parameter in its shape, and nothing else (a tied
// head and rotary frequencies are passed over).
// Errors: FAILED_PRECONDITION MODEL_TENSOR_MISSING, MODEL_TENSOR_MISMATCH,
// MODEL_TENSOR_UNKNOWN, MODEL_DTYPE_UNSUPPORTED, naming the tensor.
absl::Status CheckTensors(const HfWeights& files, const ParamTable& table,
                          const ModelConfig& config);

// Fills `weights`, this rank's, piece by piece; reads nothing else of the
// files. REQUIRES: CheckTensors is OK.
absl::Status LoadParameters(const HfWeights& files, const ParamTable& table,
                            const ShardLayout& layout, int rank,
                            FlatWeights& weights,
                            const std::function<void(double)>& on_progress);

// Writes `weights` (f32 or bf16) as a Hugging Face directory with the
// tokenizer's files of `source`, unit by unit. Atomic. All ranks call it; an
// empty `directory` only hands out the weights this rank holds.
struct ExportSource {
  std::string model_directory;
  std::string config_json;  // the source's config.json
  DType dtype;              // of the weights
};
absl::StatusOr<ExportOutcome> ExportParameters(const ExportSource& source,
                                               const ParamTable& table,
                                               const ShardLayout& layout,
                                               UnitWeights& weights,
                                               Device& device, Stream& stream,
                                               const std::string& directory);

}  // namespace gradwire
