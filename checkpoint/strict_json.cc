// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/strict_json.h"

#include <utility>
#include <vector>

namespace gradwire {

using Json = nlohmann::json;

std::string ParseStrictJson(const std::string& text, int max_depth,
                            Json* json) {
  // The parser takes a zero byte for the end, whatever follows, and passes over
  // a byte order mark; others do neither.
  if (text.find('\0') != std::string::npos ||
      text.starts_with("\xEF\xBB\xBF")) {
    return "is not a JSON object";
  }
  bool deep = false;
  std::string twice;
  // Two readers could take different ones of two members with one name.
  std::vector<std::set<std::string>> names;
  const auto callback = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > max_depth) deep = true;
    if (event == Json::parse_event_t::object_start) names.emplace_back();
    if (event == Json::parse_event_t::object_end && !names.empty()) {
      names.pop_back();
    }
    if (event == Json::parse_event_t::key && !names.empty()) {
      const std::string& name = value.get_ref<const std::string&>();
      if (!names.back().insert(name).second) twice = name;
    }
    return !deep && twice.empty();
  };
  *json = Json::parse(text, callback, /*allow_exceptions=*/false);
  if (deep) return "is nested too deep";
  if (!twice.empty()) return "names \"" + twice.substr(0, 40) + "\" twice";
  if (json->is_discarded() || !json->is_object()) return "is not a JSON object";
  return "";
}

JsonFields::JsonFields(const Json& object, std::string where)
    : object_(object), where_(std::move(where)) {
  if (!object.is_object()) Refuse("", "is not an object");
}

void JsonFields::Refuse(const std::string& name, const std::string& what) {
  if (!what_.empty()) return;
  field_ = where_ + name.substr(0, 40);
  what_ = what;
}

const Json* JsonFields::Take(const std::string& name) {
  if (!what_.empty()) return nullptr;
  const auto found = object_.find(name);
  if (found == object_.end()) {
    Refuse(name, "is missing");
    return nullptr;
  }
  taken_.insert(name);
  return &*found;
}

int64_t JsonFields::Integer(const std::string& name, int64_t least,
                            int64_t most) {
  const Json* value = Take(name);
  if (value == nullptr) return 0;
  // A number above 2^63 is unsigned, one above 2^64 no integer.
  const bool fits =
      value->is_number_integer() &&
      (!value->is_number_unsigned() || value->get<uint64_t>() <= INT64_MAX) &&
      value->get<int64_t>() >= least && value->get<int64_t>() <= most;
  if (fits) return value->get<int64_t>();
  Refuse(name, "is not an integer from " + std::to_string(least) + " to " +
                   std::to_string(most));
  return 0;
}

std::string JsonFields::String(const std::string& name, int64_t max_bytes) {
  const Json* value = Take(name);
  if (value == nullptr) return "";
  if (value->is_string()) {
    const std::string& text = value->get_ref<const std::string&>();
    if (std::ssize(text) <= max_bytes) return text;
  }
  Refuse(name,
         "is not a string of at most " + std::to_string(max_bytes) + " bytes");
  return "";
}

const Json* JsonFields::Array(const std::string& name) {
  const Json* value = Take(name);
  if (value == nullptr || value->is_array()) return value;
  Refuse(name, "is not an array");
  return nullptr;
}

const Json* JsonFields::Object(const std::string& name) {
  const Json* value = Take(name);
  if (value == nullptr || value->is_object()) return value;
  Refuse(name, "is not an object");
  return nullptr;
}

bool JsonFields::Done() {
  if (!what_.empty()) return false;
  for (const auto& [name, value] : object_.items()) {
    if (!taken_.contains(name)) Refuse(name, "is not known");
  }
  return what_.empty();
}

}  // namespace gradwire
