// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/strict_json.h"

#include <gtest/gtest.h>

#include <functional>

namespace gradwire {
namespace {

using Json = nlohmann::json;

std::string Wrong(const std::string& text) {
  Json json;
  return ParseStrictJson(text, 2, &json);
}

TEST(StrictJsonTest, TakesObjectsOfABoundedDepth) {
  EXPECT_EQ(Wrong("{}"), "");
  EXPECT_EQ(Wrong(R"({"a": [1], "b": {"a": 2}})"), "");
  EXPECT_EQ(Wrong(R"({"a": [[1]]})"), "is nested too deep");
  EXPECT_EQ(Wrong(R"({"a": {"b": {"c": 1}}})"), "is nested too deep");
  // As deep as it is long.
  EXPECT_EQ(Wrong("{\"a\": " + std::string(1'000'000, '[')),
            "is nested too deep");
  for (const char* text : {"", "[]", "1", "nul", "{} {}", "{\"a\": 1,}",
                           "{\"a\": 1e999}", "{\"\xff\": 1}", "{\"a\"}"}) {
    EXPECT_EQ(Wrong(text), "is not a JSON object") << text;
  }
}

TEST(StrictJsonTest, TakesNothingThatOthersReadDifferently) {
  using namespace std::string_literals;
  for (const std::string& text :
       {"{}\0"s, "{}\0{\"a\": 1}"s, "{\"a\":\0 1}"s, "\xEF\xBB\xBF{}"s}) {
    EXPECT_EQ(Wrong(text), "is not a JSON object");
  }
  EXPECT_EQ(Wrong(" {\"\\u0000\": \"\xEF\xBB\xBF\"}\n"), "");
}

TEST(StrictJsonTest, TakesANameOnce) {
  EXPECT_EQ(Wrong(R"({"a": 1, "b": 2, "a": 1})"), "names \"a\" twice");
  EXPECT_EQ(Wrong(R"({"b": {"a": 1, "a": 1}})"), "names \"a\" twice");
  EXPECT_EQ(Wrong(R"({"b": [{"a": 1}, {"a": 1}], "c": {"a": 1}})"),
            "is nested too deep");
  EXPECT_EQ(Wrong(R"({"b": {"a": 1}, "c": {"a": 1}})"), "");
  // The first thing that is wrong.
  EXPECT_EQ(Wrong(R"({"a": 1, "a": [[1]]})"), "names \"a\" twice");
  EXPECT_EQ(Wrong(R"({"a": [[1]], "a": 1)"), "is nested too deep");
}

TEST(JsonFieldsTest, TheFirstMistakeSticks) {
  const Json json = {{"a", 5}, {"b", "text"}, {"c", Json::array()}};
  JsonFields right(json);
  EXPECT_EQ(right.Integer("a", 5, 5), 5);
  EXPECT_EQ(right.String("b", 4), "text");
  EXPECT_NE(right.Array("c"), nullptr);
  EXPECT_TRUE(right.Done());

  JsonFields wrong(json, "here.");
  EXPECT_EQ(wrong.Integer("a", 6, 7), 0);
  EXPECT_EQ(wrong.String("b", 4), "");
  EXPECT_EQ(wrong.Array("c"), nullptr);
  EXPECT_FALSE(wrong.Done());
  EXPECT_EQ(wrong.field(), "here.a");
  EXPECT_EQ(wrong.what(), "is not an integer from 6 to 7");
}

TEST(JsonFieldsTest, RefusesWhatIsNoneOfItsKind) {
  const Json json = {{"a", UINT64_MAX}, {"b", 1.0}, {"c", "long"}};
  const auto what = [&](const std::function<void(JsonFields&)>& take) {
    JsonFields fields(json);
    take(fields);
    EXPECT_FALSE(fields.Done());
    return fields.what();
  };
  const auto integer = [](const char* name) {
    return [name](JsonFields& f) { f.Integer(name, INT64_MIN, INT64_MAX); };
  };
  for (const char* name : {"a", "b", "c"}) {
    EXPECT_TRUE(what(integer(name)).starts_with("is not an integer")) << name;
  }
  EXPECT_EQ(what(integer("d")), "is missing");
  EXPECT_EQ(what([](JsonFields& f) { f.String("c", 3); }),
            "is not a string of at most 3 bytes");
  EXPECT_EQ(what([](JsonFields& f) { f.Array("c"); }), "is not an array");
  EXPECT_EQ(what([](JsonFields& f) { f.Object("c"); }), "is not an object");
  EXPECT_EQ(what([](JsonFields& f) { f.Refuse("c", "is bad"); }), "is bad");
  // Nobody has taken anything.
  EXPECT_EQ(what([](JsonFields&) {}), "is not known");
  const Json number = 1;
  EXPECT_FALSE(JsonFields(number).Done());
}

}  // namespace
}  // namespace gradwire
