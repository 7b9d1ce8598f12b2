// SPDX-License-Identifier: Apache-2.0
// JSON that somebody else wrote: parsed without exceptions, with a bound on its
// depth, and each name once. Its size is the caller's to bound.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

namespace gradwire {

// Sets `json`, an object. Returns what is wrong, as the end of a sentence that
// begins with the text's name; "" if nothing is.
std::string ParseStrictJson(const std::string& text, int max_depth,
                            nlohmann::json* json);

// Takes the members of an object one by one. The first mistake sticks: what
// comes later returns 0 or nothing.
class JsonFields {
 public:
  // `where` goes before the names in field(): "pieces[3].".
  explicit JsonFields(const nlohmann::json& object, std::string where = "");

  int64_t Integer(const std::string& name, int64_t least, int64_t most);
  std::string String(const std::string& name, int64_t max_bytes);
  // Null after a mistake.
  const nlohmann::json* Array(const std::string& name);
  const nlohmann::json* Object(const std::string& name);
  // A mistake that the caller has found.
  void Refuse(const std::string& name, const std::string& what);
  // Whether all is well; members that nobody has taken are a mistake.
  bool Done();

  // Of the first mistake.
  const std::string& field() const { return field_; }
  const std::string& what() const { return what_; }

 private:
  const nlohmann::json* Take(const std::string& name);

  const nlohmann::json& object_;
  const std::string where_;
  std::set<std::string> taken_;
  std::string field_, what_;
};

}  // namespace gradwire
