// SPDX-License-Identifier: Apache-2.0
// model.safetensors.index.json of a directory whose weights are in shards.
#include <nlohmann/json.hpp>
#include <string>

#include "base/check.h"
#include "checkpoint/safetensors.h"
#include "tests/fuzz/fuzz.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

// The text of an index, as others write it.
std::string TextOf(const SafetensorsIndex& index) {
  Json json = {{"weight_map", Json::object()}};
  for (const auto& [tensor, file] : index.weight_map) {
    json["weight_map"][tensor] = file;
  }
  if (index.total_size >= 0) json["metadata"]["total_size"] = index.total_size;
  return json.dump();
}

}  // namespace

std::string FuzzSeed(Dice& dice) {
  SafetensorsIndex index;
  const int64_t tensors = dice.Below(4);
  for (int64_t i = 0; i < tensors; ++i) {
    index.weight_map["layers." + std::to_string(i)] =
        "model-0000" + std::to_string(1 + i / 2) + "-of-00002.safetensors";
  }
  if (dice.OneIn(2)) index.total_size = 1000 * tensors;
  return TextOf(index);
}

void FuzzMutate(std::string& input, Dice& dice) {
  for (int64_t i = dice.Changes(); i > 0; --i) MutateJson(input, dice);
}

void FuzzOne(const std::string& input) {
  absl::StatusOr<SafetensorsIndex> index;
  {
    const BoundedMemory bound(20'000, 300, input.size());
    index = ParseSafetensorsIndex(input);
  }
  if (!index.ok()) {
    CheckRefusal(index.status());
    return;
  }
  CountAccepted();
  // Whatever it says, no file outside of the directory is opened.
  for (const auto& [tensor, file] : index->weight_map) {
    GW_CHECK(!file.empty() && file[0] != '.');
    GW_CHECK(file.find('/') == std::string::npos);
    GW_CHECK(file.find('\0') == std::string::npos);
  }
  GW_CHECK(index->total_size >= -1);
  // None of its tensors is passed over.
  GW_CHECK(Json::parse(input)["weight_map"].size() == index->weight_map.size());
  const auto again = ParseSafetensorsIndex(TextOf(*index));
  GW_CHECK(again.ok() && *again == *index);
}

}  // namespace gradwire
