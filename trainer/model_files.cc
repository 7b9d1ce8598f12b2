// SPDX-License-Identifier: Apache-2.0
#include "trainer/model_files.h"

#include <algorithm>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/publish.h"
#include "nlohmann/json.hpp"

namespace gradwire {
namespace {

constexpr int64_t kStagingElements = 1 << 20;
constexpr int64_t kCopiedFileLimit = 256 << 20;

// What belongs to a model beside its weights and config.json.
constexpr const char* kCopiedFiles[] = {"tokenizer.json",
                                        "tokenizer_config.json",
                                        "tokenizer.model",
                                        "vocab.json",
                                        "merges.txt",
                                        "added_tokens.json",
                                        "chat_template.jinja",
                                        "chat_template.json",
                                        "generation_config.json",
                                        "special_tokens_map.json"};

std::string ShapeString(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    out += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return out + "]";
}

ErrorBuilder TensorError(const std::string& reason, const std::string& name) {
  ErrorBuilder error(absl::StatusCode::kFailedPrecondition, reason);
  error.With("field", name.substr(0, 200));
  return error;
}

// Tensors of some checkpoints that the model does not read.
bool IsPassedOver(const std::string& name, const ModelConfig& config) {
  return name.ends_with(".rotary_emb.inv_freq") ||
         (config.tied_embeddings && name == "lm_head.weight");
}

}  // namespace

absl::Status CheckTensors(const HfWeights& files, const ParamTable& table,
                          const ModelConfig& config) {
  for (const ParamRow& row : table.rows()) {
    const SafetensorsEntry* entry = files.Find(row.hf_name);
    if (entry == nullptr) {
      return TensorError("MODEL_TENSOR_MISSING", row.hf_name)
          .Message("The model's files have no tensor " + row.hf_name +
                   ", which its config.json asks for.");
    }
    if (entry->shape != row.shape) {
      return TensorError("MODEL_TENSOR_MISMATCH", row.hf_name)
          .With("value", ShapeString(entry->shape))
          .With("limit", ShapeString(row.shape))
          .Message(row.hf_name + " is " + ShapeString(entry->shape) +
                   " in the model's files and " + ShapeString(row.shape) +
                   " by its config.json.");
    }
    if (entry->dtype != "F32" && entry->dtype != "F16" &&
        entry->dtype != "BF16") {
      return TensorError("MODEL_DTYPE_UNSUPPORTED", row.hf_name)
          .With("value", entry->dtype)
          .With("limit", "F32, F16, BF16")
          .Message(row.hf_name + " is stored as " + entry->dtype +
                   "; gradwire reads F32, F16 and BF16. Convert the model.");
    }
  }
  for (const std::string& name : files.Names()) {
    if (table.Find(name) == nullptr && !IsPassedOver(name, config)) {
      return TensorError("MODEL_TENSOR_UNKNOWN", name)
          .Message("The model's files hold " + name.substr(0, 200) +
                   ", which " + config.architecture +
                   " does not have: it is another model than its config.json "
                   "says.");
    }
  }
  return absl::OkStatus();
}

absl::Status LoadParameters(const HfWeights& files, const ParamTable& table,
                            const ShardLayout& layout, int rank,
                            FlatWeights& weights,
                            const std::function<void(double)>& on_progress) {
  std::vector<float> staging(
      std::min<int64_t>(kStagingElements, table.num_elements()));
  int64_t done = 0;
  for (const ParamRow& row : table.rows()) {
    for (const ShardPiece& piece :
         layout.Pieces(row.offset, row.offset + row.num_elements)) {
      done += piece.size();
      if (piece.rank != rank) continue;
      for (int64_t at = 0; at < piece.size();) {
        const int64_t count = std::min<int64_t>(
            static_cast<int64_t>(staging.size()), piece.size() - at);
        GW_RETURN_IF_ERROR(files.ReadFloats(
            row.hf_name, piece.begin - row.offset + at, count, staging.data()));
        GW_RETURN_IF_ERROR(
            weights.Write(piece.offset + at, count, staging.data()));
        at += count;
      }
      on_progress(static_cast<double>(done) /
                  static_cast<double>(table.num_parameters()));
    }
  }
  return absl::OkStatus();
}

std::vector<TensorInfo> TensorsOf(const ParamTable& table, DType dtype) {
  std::vector<TensorInfo> tensors;
  for (const ParamRow& row : table.rows()) {
    tensors.push_back(
        {row.hf_name, dtype == DType::kF32 ? "F32" : "BF16", row.shape});
  }
  return tensors;
}

absl::Status ReadParameters(
    const ParamTable& table, const ShardLayout& layout, UnitWeights& weights,
    Device& device, Stream& stream,
    const std::function<void(std::vector<char> bytes, int64_t elements)>&
        append) {
  auto row = table.rows().begin();
  for (int unit = 0; unit < layout.num_units(); ++unit) {
    const ShardUnit& u = layout.unit(unit);
    const AcquiredUnit held(weights, stream, unit);
    for (; row != table.rows().end() && row->offset < u.end; ++row) {
      for (int64_t begin = 0; append && begin < row->num_elements;) {
        const int64_t count =
            std::min(kSnapshotPieceElements, row->num_elements - begin);
        const int64_t at = row->offset - u.begin + begin;
        const Tensor part = held.values().Rows(at, at + count);
        std::vector<char> bytes(static_cast<size_t>(part.bytes()));
        device.CopyToHost(stream, part, bytes.data());
        append(std::move(bytes), count);
        begin += count;
      }
    }
  }
  return stream.Finish();
}

absl::Status CopyModelFiles(const std::string& model_directory,
                            const std::string& config_json, DType dtype,
                            SnapshotWriter& writer) {
  nlohmann::ordered_json config = nlohmann::ordered_json::parse(config_json);
  const char* name = dtype == DType::kF32 ? "float32" : "bfloat16";
  const bool newer = config.contains("dtype");
  if (newer) config["dtype"] = name;
  if (!newer || config.contains("torch_dtype")) config["torch_dtype"] = name;
  writer.AddFile("config.json", config.dump(2) + "\n");
  for (const char* file : kCopiedFiles) {
    auto content =
        ReadSmallFile(model_directory + "/" + file, kCopiedFileLimit);
    if (absl::IsNotFound(content.status())) continue;
    if (!content.ok()) return content.status();
    writer.AddFile(file, *content);
  }
  return absl::OkStatus();
}

}  // namespace gradwire
