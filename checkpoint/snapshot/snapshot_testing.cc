// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/snapshot/snapshot_testing.h"

#include <algorithm>
#include <random>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

void Append(const TestWeights& weights, SnapshotWriter& writer) {
  for (size_t t = 0; t < weights.infos.size(); ++t) {
    const int64_t n = weights.infos[t].num_elements();
    const int64_t width = DeltaElementBytes(weights.infos[t].dtype);
    for (int64_t at = 0; at < n; at += kSnapshotPieceElements) {
      writer.Append(weights.values[t].data() + at * width,
                    std::min(kSnapshotPieceElements, n - at));
    }
  }
}

TestWeights Fill(std::vector<TensorInfo> infos) {
  TestWeights weights;
  weights.infos = std::move(infos);
  std::mt19937 random(7);
  for (const TensorInfo& info : weights.infos) {
    std::string value(static_cast<size_t>(info.num_elements() *
                                          DeltaElementBytes(info.dtype)),
                      '\0');
    for (char& byte : value) byte = static_cast<char>(random());
    weights.values.push_back(std::move(value));
  }
  return weights;
}

}  // namespace

std::string TestWeights::File() const {
  CrashFileSystem files;
  std::vector<SafetensorsWriter::Row> rows;
  for (const TensorInfo& info : infos) {
    rows.push_back({info.name, info.dtype, info.shape});
  }
  SafetensorsWriter writer(files, "/f", rows);
  for (const std::string& value : values) {
    writer.Append(value.data(), std::ssize(value));
  }
  GW_CHECK(writer.Finish().ok());
  return files.Latest().files.at("/f");
}

std::map<std::string, std::string> TestWeights::Files(
    int64_t shard_bytes) const {
  std::vector<TestWeights> shards(1);
  int64_t bytes = 0, total = 0, elements = 0;
  for (size_t i = 0; i < infos.size(); ++i) {
    const int64_t size = std::ssize(values[i]);
    if (i > 0 && bytes + size > shard_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().infos.push_back(infos[i]);
    shards.back().values.push_back(values[i]);
    bytes += size;
    total += size;
    elements += infos[i].num_elements();
  }
  if (shards.size() == 1) return {{"model.safetensors", File()}};
  std::map<std::string, std::string> files, map;
  for (size_t i = 0; i < shards.size(); ++i) {
    const auto digits = [](size_t n) {
      return std::string(n < 10 ? "0000" : "000") + std::to_string(n);
    };
    const std::string name = "model-" + digits(i + 1) + "-of-" +
                             digits(shards.size()) + ".safetensors";
    files[name] = shards[i].File();
    for (const TensorInfo& info : shards[i].infos) map[info.name] = name;
  }
  std::string lines;
  for (const auto& [tensor, name] : map) {
    lines += (lines.empty() ? "" : ",");
    lines += "\n    \"" + tensor + "\": \"" + name + "\"";
  }
  files["model.safetensors.index.json"] =
      "{\n  \"metadata\": {\n    \"total_parameters\": " +
      std::to_string(elements) +
      ",\n    \"total_size\": " + std::to_string(total) +
      "\n  },\n  \"weight_map\": {" + lines + "\n  }\n}\n";
  return files;
}

TestWeights MakeWeights(int64_t scale, const std::string& dtype) {
  // Not in the order of their names.
  return Fill(
      {{"model.norm", dtype, {7 * scale}}, {"embed", dtype, {3 * scale, 5}}});
}

TestWeights MakeLayers() {
  return Fill({{"model.norm", "BF16", {14}},
               {"embed", "BF16", {6, 5}},
               {"layer", "BF16", {100}},
               {"bias", "BF16", {2}},
               {"a", "BF16", {2, 3}}});
}

TestWeights Step(const TestWeights& weights, uint32_t seed) {
  TestWeights stepped = weights;
  std::mt19937 random(seed);
  for (std::string& value : stepped.values) {
    for (int64_t i = 0; i < std::ssize(value) / 20 + 1; ++i) {
      char& byte = value[random() % value.size()];
      byte = static_cast<char>(byte ^ (1 + random() % 255));
    }
  }
  return stepped;
}

absl::StatusOr<SnapshotManifest> SaveTestSnapshot(FileSystem& files,
                                                  const std::string& path,
                                                  const TestWeights& weights,
                                                  const TestSave& save) {
  SnapshotRequest request;
  request.directory = path;
  request.job = "job";
  request.kind = save.kind;
  request.parent = save.parent;
  request.operation = save.operation;
  request.base_model = "tiny";
  request.optimizer_step = save.step;
  request.weight_version = save.step + 1;
  request.ttl_seconds = save.ttl_seconds;
  request.tensors = weights.infos;
  request.memory_bytes = save.memory_bytes;
  request.shard_bytes = save.shard_bytes;
  GW_ASSIGN_OR_RETURN(SnapshotPlan plan,
                      PlanSnapshot(files, std::move(request)));
  if (plan.existing) return *plan.existing;
  GW_ASSIGN_OR_RETURN(const auto writer,
                      SnapshotWriter::Create(files, std::move(plan)));
  Append(weights, *writer);
  if (!writer->is_delta()) writer->AddFile("config.json", "{}");
  GW_RETURN_IF_ERROR(writer->Finish(save.now_micros));
  return writer->Publish();
}

absl::StatusOr<std::string> ReadTestSnapshot(FileSystem& files,
                                             const std::string& directory,
                                             const std::string& name) {
  GW_ASSIGN_OR_RETURN(const auto chain, ReadChain(files, directory, name));
  GW_ASSIGN_OR_RETURN(const auto image,
                      SnapshotImage::Read(files, directory, chain, INT64_MAX));
  for (const SnapshotManifest& each : chain) {
    for (const SnapshotFile& file : each.files) {
      GW_RETURN_IF_ERROR(
          ReadSnapshotFile(files, directory + "/" + each.name, file).status());
    }
  }
  TestWeights weights;
  for (const auto& [info, data] : image->tensors()) {
    weights.infos.push_back(info);
    weights.values.emplace_back(
        static_cast<const char*>(data),
        static_cast<size_t>(info.num_elements() *
                            DeltaElementBytes(info.dtype)));
  }
  return weights.File();
}

std::string ReasonOf(const absl::Status& status) {
  if (status.ok()) return "";
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : status.ToString();
}

}  // namespace gradwire
