// SPDX-License-Identifier: Apache-2.0
// Between a Hugging Face directory and the flat vector of parameters.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/snapshot/writer.h"
#include "device/device.h"
#include "device/tensor.h"
#include "model/config.h"
#include "model/param_table.h"
#include "sharding/layout.h"
#include "sharding/units.h"
#include "trainer/flat_weights.h"

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

// The parameters as tensors of a file, in the order of ReadParameters. `dtype`:
// of the weights, f32 or bf16.
std::vector<TensorInfo> TensorsOf(const ParamTable& table, DType dtype);

// Hands the parameters to `append` in the table's order, each in pieces of
// kSnapshotPieceElements, without ever holding more than a unit of them. All
// ranks among which the model is sharded call it; an empty `append` only hands
// out the weights this rank holds.
absl::Status ReadParameters(
    const ParamTable& table, const ShardLayout& layout, UnitWeights& weights,
    Device& device, Stream& stream,
    const std::function<void(std::vector<char> bytes, int64_t elements)>&
        append);

// What belongs to a model beside its weights: the source's config.json with
// the weights' dtype in it, and the tokenizer's files.
absl::Status CopyModelFiles(const std::string& model_directory,
                            const std::string& config_json, DType dtype,
                            SnapshotWriter& writer);

}  // namespace gradwire
