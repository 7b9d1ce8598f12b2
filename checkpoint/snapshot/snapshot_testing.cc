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

TestWeights MakeWeights(int64_t scale, const std::string& dtype) {
  TestWeights weights;
  // Not in the order of their names.
  weights.infos = {{"model.norm", dtype, {7 * scale}},
                   {"embed", dtype, {3 * scale, 5}}};
  std::mt19937 random(7);
  for (const TensorInfo& info : weights.infos) {
    std::string value(
        static_cast<size_t>(info.num_elements() * DeltaElementBytes(dtype)),
        '\0');
    for (char& byte : value) byte = static_cast<char>(random());
    weights.values.push_back(std::move(value));
  }
  return weights;
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
  GW_ASSIGN_OR_RETURN(SnapshotPlan plan,
                      PlanSnapshot(files, std::move(request)));
  if (plan.existing) return *plan.existing;
  GW_ASSIGN_OR_RETURN(const auto writer,
                      SnapshotWriter::Create(files, std::move(plan)));
  Append(weights, *writer);
  if (!writer->is_delta()) writer->AddFile("config.json", "{}");
  return writer->Publish(save.now_micros);
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
  return image->bytes();
}

std::string ReasonOf(const absl::Status& status) {
  if (status.ok()) return "";
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : status.ToString();
}

}  // namespace gradwire
