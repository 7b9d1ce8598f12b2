// SPDX-License-Identifier: Apache-2.0
#include "tests/equivalence/sharded_job.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"

namespace gradwire {

std::string Directory(const std::string& name) {
  const std::string directory = testing::TempDir() + "/sharded_" + name;
  if (std::filesystem::exists(directory + "/config.json")) return directory;
  for (const Model& model : kModels) {
    const bool broken = name == std::string(kBroken) + model.name;
    const bool untied = name == std::string(kUntied) + model.name;
    if (name != model.name && !broken && !untied) continue;
    std::filesystem::create_directories(directory);
    std::string json = model.config;
    if (untied) json.replace(json.rfind("true"), 4, "false");
    const auto config = ParseModelConfig(json);
    EXPECT_TRUE(config.ok()) << config.status();
    const ParamTable table(*config);
    std::vector<SafetensorsWriter::Row> rows;
    for (const ParamRow& row : table.rows()) {
      rows.push_back({row.hf_name, "F32", row.shape});
    }
    SafetensorsWriter writer(PosixFileSystem(),
                             directory + "/model.safetensors", rows);
    std::mt19937 random(11);
    std::normal_distribution<float> normal(0.0f, 0.15f);
    std::vector<float> embedding;
    for (const ParamRow& row : table.rows()) {
      std::vector<float> values(static_cast<size_t>(row.num_elements));
      for (float& value : values) {
        value = normal(random) + (row.group == ParamGroup::kNorm ? 1 : 0);
      }
      if (broken && row.group == ParamGroup::kEmbedding) {
        values[static_cast<size_t>(kBadToken * row.shape[1])] = NAN;
      }
      if (row.group == ParamGroup::kEmbedding) embedding = values;
      if (untied && row.group == ParamGroup::kHead) values = embedding;
      writer.Append(values.data(), row.num_elements * 4);
    }
    EXPECT_TRUE(writer.Finish().ok());
    std::ofstream(directory + "/config.json") << json;
  }
  return directory;
}

std::vector<TrainDatum> Batch(int64_t vocab, uint32_t seed,
                              const std::vector<int64_t>& lengths) {
  std::vector<TrainDatum> data;
  uint32_t state = seed;
  const auto next = [&] {
    return (state = state * 1664525u + 1013904223u) >> 8;
  };
  for (const int64_t n : lengths) {
    TrainDatum datum;
    for (int64_t i = 0; i < n; ++i) {
      datum.tokens.push_back(static_cast<int32_t>(next() % vocab));
      datum.targets.push_back(static_cast<int32_t>(next() % vocab));
      datum.weights.push_back(
          next() % 4 == 0 ? 0.0f : static_cast<float>(next() % 200) / 64 - 1);
    }
    data.push_back(datum);
  }
  return data;
}
Values Negated(const std::vector<TrainDatum>& data) {
  Values out;
  for (const TrainDatum& datum : data) {
    std::vector<float> d;
    for (const float w : datum.weights) d.push_back(-w);
    out.push_back(d);
  }
  return out;
}

ForwardOptions WithBackward() {
  ForwardOptions options;
  options.backward = true;
  return options;
}

ForwardOptions Retain(const std::string& id) {
  ForwardOptions options;
  options.activation_id = id;
  return options;
}

std::string Reason(const absl::Status& status) {
  auto detail = GetErrorDetail(status);
  return detail ? detail->reason : std::string(status.message());
}

}  // namespace gradwire
