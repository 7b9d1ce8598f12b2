// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/delta/snapshot_weights.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <utility>
#include <vector>

#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

constexpr int64_t kHeaderLimit = int64_t{16} << 20;

[[noreturn]] void Fail(const std::string& path, const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", path.c_str(), what.c_str());
  std::exit(EXIT_FAILURE);
}

struct Weights {
  std::vector<TensorInfo> tensors;
  std::vector<uint16_t> values;
};

Weights Read(const std::string& path) {
  std::ostringstream content;
  content << std::ifstream(path, std::ios::binary).rdbuf();
  const std::string file = std::move(content).str();
  const auto header = ParseSafetensors(file, kHeaderLimit);
  if (!header.ok()) Fail(path, std::string(header.status().message()));
  std::vector<std::pair<std::string, SafetensorsEntry>> entries;
  for (const auto& entry : header->entries) {
    if (entry.second.dtype == "BF16") entries.push_back(entry);
  }
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return a.second.offset < b.second.offset;
  });
  Weights weights;
  for (const auto& [name, entry] : entries) {
    weights.tensors.push_back({name, entry.dtype, entry.shape});
    const size_t begin = weights.values.size();
    weights.values.resize(begin + static_cast<size_t>(entry.bytes / 2));
    std::memcpy(weights.values.data() + begin, file.data() + entry.offset,
                static_cast<size_t>(entry.bytes));
  }
  if (weights.values.empty()) Fail(path, "no bf16 tensors");
  return weights;
}

}  // namespace

TrainedWeights ReadSnapshots(const std::string& before,
                             const std::string& after) {
  Weights old = Read(before), trained = Read(after);
  if (old.tensors != trained.tensors) {
    Fail(after, "has other tensors than " + before);
  }
  return {std::move(old.tensors), std::move(old.values),
          std::move(trained.values)};
}

}  // namespace gradwire
