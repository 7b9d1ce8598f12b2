// SPDX-License-Identifier: Apache-2.0
// JSON that somebody else wrote, and its members.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>

#include "base/check.h"
#include "checkpoint/strict_json.h"
#include "tests/fuzz/fuzz.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

constexpr int kMaxDepth = 5;

int Depth(const Json& json) {
  if (!json.is_structured()) return 0;
  int deepest = 0;
  for (const Json& child : json) deepest = std::max(deepest, Depth(child));
  return 1 + deepest;
}

// Not by comparing values: these compare as signed ones.
bool IsInteger(const Json& value) {
  return value.is_number_unsigned()
             ? value.get<uint64_t>() <= uint64_t{INT64_MAX}
             : value.is_number_integer() && value.get<int64_t>() >= -5;
}

// Takes what there is, by the kinds that the members are and others.
void CheckFields(const Json& json) {
  JsonFields all(json);
  for (const auto& [name, value] : json.items()) {
    if (value.is_object()) GW_CHECK(all.Object(name) == &value);
    if (value.is_array()) GW_CHECK(all.Array(name) == &value);
    if (value.is_string()) {
      GW_CHECK(all.String(name, INT64_MAX) == value.get<std::string>());
    }
    if (value.is_number_integer()) {
      JsonFields fields(json);
      const int64_t number = fields.Integer(name, -5, INT64_MAX);
      GW_CHECK(number >= -5);
      GW_CHECK(fields.what().empty() == IsInteger(value));
      if (fields.what().empty()) all.Integer(name, number, number);
    }
    JsonFields wrong(json, "where.");
    wrong.Integer(name, 7, 7);
    wrong.String(name, 3);
    wrong.Array(name);
    // The first mistake sticks: no member is two of these.
    GW_CHECK(!wrong.what().empty() && !wrong.Done());
    GW_CHECK(wrong.field().size() <= 46 && wrong.Object(name) == nullptr);
  }
  const bool known = std::all_of(json.begin(), json.end(), [](const Json& v) {
    return v.is_structured() || v.is_string() || IsInteger(v);
  });
  GW_CHECK(all.Done() == known);
}

}  // namespace

std::string FuzzSeed(Dice& dice) {
  Json json = {{"a", 1},
               {"b", "text"},
               {"c", {1, -2, 3.5, true, nullptr}},
               {"d", {{"e", {{"f", "\u00e4\n"}}}}},
               {"g", UINT64_MAX}};
  while (json.size() > 1 && dice.OneIn(2)) json.erase(json.begin());
  return json.dump(dice.OneIn(2) ? 1 : -1);
}

void FuzzMutate(std::string& input, Dice& dice) {
  for (int64_t i = dice.Changes(); i > 0; --i) MutateJson(input, dice);
}

void FuzzOne(const std::string& input) {
  Json json;
  std::string wrong;
  {
    const BoundedMemory bound(20'000, 300, input.size());
    wrong = ParseStrictJson(input, kMaxDepth, &json);
  }
  if (!wrong.empty()) {
    GW_CHECK(wrong.size() <= 100);
    return;
  }
  CountAccepted();
  GW_CHECK(json.is_object() && Depth(json) <= kMaxDepth + 1);
  // What this parser passes over, another takes for the end or for an error.
  GW_CHECK(input.find('\0') == std::string::npos);
  GW_CHECK(!input.starts_with("\xEF\xBB\xBF"));
  Json again;
  GW_CHECK(ParseStrictJson(json.dump(), kMaxDepth, &again).empty());
  GW_CHECK(again == json);
  CheckFields(json);
}

}  // namespace gradwire
