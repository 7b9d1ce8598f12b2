// SPDX-License-Identifier: Apache-2.0
// Writes DIRECTORY/delta.safetensors, which uses all of the format, and for
// each tensor DIRECTORY/old.<name> and new.<name>, its raw bytes, for
// test_dlt1.py.
#include <cstdio>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "checkpoint/delta/encode.h"

namespace gradwire {
namespace {

struct Tensor {
  TensorInfo info;
  std::vector<uint16_t> before, after;  // of 16-bit elements, or halves of 32
};

Tensor Make(const std::string& name, const std::string& dtype,
            std::vector<int64_t> shape, double density, std::mt19937& random) {
  Tensor tensor;
  tensor.info = {name, dtype, std::move(shape)};
  const int64_t words = tensor.info.num_elements() * (dtype == "F32" ? 2 : 1);
  // Few different values, so that the golden files compress.
  for (int64_t i = 0; i < words; ++i) {
    tensor.before.push_back(
        static_cast<uint16_t>((random() & 0x8003) | 0x3c00));
  }
  tensor.after = tensor.before;
  for (uint16_t& value : tensor.after) {
    if (random() % 10000 >= density * 10000) continue;
    const uint32_t kind = random() % 50;
    if (kind == 0) {
      value = static_cast<uint16_t>(random());
    } else {
      value = static_cast<uint16_t>(kind % 2 ? value + 1 : value - 1);
    }
  }
  return tensor;
}

void WriteBytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string BytesOf(const std::vector<uint16_t>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()),
                     values.size() * 2);
}

void Main(const std::string& directory) {
  std::mt19937 random(1);
  std::vector<Tensor> tensors;
  tensors.push_back(Make("gaps", "BF16", {2, 40000}, 0.004, random));
  tensors.push_back(Make("bitmap", "BF16", {1001}, 0.3, random));
  tensors.push_back(Make("dense", "F16", {70000}, 0.8, random));
  tensors.push_back(Make("raw", "F32", {100}, 0.1, random));
  tensors.push_back(Make("kept", "BF16", {10}, 0, random));
  tensors.push_back(Make("shards", "BF16", {150000}, 0.02, random));
  std::vector<TensorView> before, after;
  for (const Tensor& tensor : tensors) {
    before.push_back({tensor.info, tensor.before.data()});
    after.push_back({tensor.info, tensor.after.data()});
  }
  std::vector<uint16_t> fresh(300, 0x3f80);
  after.push_back({{"fresh", "BF16", {300}}, fresh.data()});
  DeltaOptions options;
  options.model = "sample";
  options.step = 3;
  options.prev_id = ComputeWeightId(before);
  options.base_id = options.prev_id;
  options.shard_begins["shards"] = {kChunkElements};
  const auto file = EncodeDelta(before, after, options);
  GW_CHECK(file.ok());
  WriteBytes(directory + "/delta.safetensors", *file);
  for (const Tensor& tensor : tensors) {
    WriteBytes(directory + "/old." + tensor.info.name, BytesOf(tensor.before));
    WriteBytes(directory + "/new." + tensor.info.name, BytesOf(tensor.after));
  }
  WriteBytes(directory + "/new.fresh", BytesOf(fresh));
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: write_sample DIRECTORY\n");
    return 2;
  }
  gradwire::Main(argv[1]);
  return 0;
}
