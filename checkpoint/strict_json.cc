// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/strict_json.h"

#include <utility>
#include <vector>

namespace gradwire {

using Json = nlohmann::json;

namespace {

// Builds the value as it is read, and ends at the first thing that is wrong.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  Builder(int max_depth, Json* root)
      : max_depth_(static_cast<size_t>(max_depth)), root_(root) {}

  // As ParseStrictJson says it; "" too for what is no JSON.
  const std::string& wrong() const { return wrong_; }

  bool null() override { return Put(nullptr) != nullptr; }
  bool boolean(bool value) override { return Put(value) != nullptr; }
  bool number_integer(int64_t value) override { return Put(value) != nullptr; }
  bool number_unsigned(uint64_t value) override {
    return Put(value) != nullptr;
  }
  bool number_float(double value, const std::string&) override {
    return Put(value) != nullptr;
  }
  bool string(std::string& value) override {
    return Put(std::move(value)) != nullptr;
  }
  bool binary(Json::binary_t&) override { return false; }
  bool start_object(size_t) override { return Open(Json::object()); }
  bool start_array(size_t) override { return Open(Json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(std::string& name) override {
    if (!FitsDepth()) return false;
    // Two readers could take different ones of two members with one name.
    auto& members = open_.back()->get_ref<Json::object_t&>();
    const auto [member, is_new] = members.try_emplace(std::move(name));
    if (!is_new) {
      wrong_ = "names \"" + member->first.substr(0, 40) + "\" twice";
    }
    member_ = &member->second;
    return is_new;
  }
  bool parse_error(size_t, const std::string&,
                   const Json::exception&) override {
    return false;
  }

 private:
  bool FitsDepth() {
    if (open_.size() > max_depth_) wrong_ = "is nested too deep";
    return wrong_.empty();
  }
  // Where the value now is, or null.
  Json* Put(Json value) {
    if (!FitsDepth()) return nullptr;
    if (!open_.empty() && open_.back()->is_array()) {
      return &open_.back()->emplace_back(std::move(value));
    }
    Json* place = open_.empty() ? root_ : member_;
    *place = std::move(value);
    return place;
  }
  bool Open(Json value) {
    Json* place = Put(std::move(value));
    if (place != nullptr) open_.push_back(place);
    return place != nullptr;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  const size_t max_depth_;
  Json* const root_;
  std::vector<Json*> open_;  // objects and arrays, from the root
  Json* member_ = nullptr;   // that was named last
  std::string wrong_;
};

}  // namespace

std::string ParseStrictJson(const std::string& text, int max_depth,
                            Json* json) {
  // The parser takes a zero byte for the end, whatever follows, and passes over
  // a byte order mark; others do neither.
  if (text.find('\0') != std::string::npos ||
      text.starts_with("\xEF\xBB\xBF")) {
    return "is not a JSON object";
  }
  Builder builder(max_depth, json);
  const bool whole = Json::sax_parse(text, &builder);
  if (!builder.wrong().empty()) return builder.wrong();
  return whole && json->is_object() ? "" : "is not a JSON object";
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
