// SPDX-License-Identifier: Apache-2.0
// Changes of JSON texts. They work on the text and not on parsed values: what
// two parsers take for different things (names that come twice, numbers in odd
// forms) has no parsed form, and a mutator has to be fast.
#include <algorithm>
#include <array>
#include <charconv>
#include <utility>
#include <vector>

#include "checkpoint/sealed_text.h"
#include "tests/fuzz/fuzz.h"

namespace gradwire {
namespace {

using namespace std::string_literals;

enum class Kind { kText, kKey, kScalar, kList, kObject, kMember };

struct Span {
  size_t begin = 0, end = 0;
  Kind kind = Kind::kText;

  size_t size() const { return end - begin; }
};

constexpr size_t kMaxSpans = 400;

size_t EndOfText(std::string_view json, size_t at) {
  for (++at; at < json.size() && json[at] != '"'; ++at) {
    if (json[at] == '\\') ++at;
  }
  return std::min(at + 1, json.size());
}

// What a text has, in the order of the ends; what is not JSON is passed over.
std::vector<Span> SpansOf(std::string_view json) {
  constexpr std::string_view kPunctuation = "{}[],:\" \n\t";
  constexpr size_t kNone = std::string_view::npos;
  struct Open {
    size_t begin;
    size_t key;  // of the member that is being read
  };
  std::vector<Span> spans;
  std::vector<Open> open = {{0, kNone}};
  const auto add = [&](size_t begin, size_t end, Kind kind) {
    spans.push_back({begin, end, kind});
    if (open.back().key != kNone) {
      spans.push_back({open.back().key, end, Kind::kMember});
      open.back().key = kNone;
    }
  };
  for (size_t at = 0; at < json.size() && spans.size() < kMaxSpans;) {
    const char c = json[at];
    const size_t begin = at++;
    if (c == '{' || c == '[') {
      open.push_back({begin, kNone});
    } else if ((c == '}' || c == ']') && open.size() > 1) {
      const size_t opened = open.back().begin;
      open.pop_back();
      add(opened, at, c == '}' ? Kind::kObject : Kind::kList);
    } else if (c == '"') {
      at = EndOfText(json, begin);
      const size_t next = json.find_first_not_of(" \n\t", at);
      if (next != kNone && json[next] == ':') {
        spans.push_back({begin, at, Kind::kKey});
        open.back().key = begin;
      } else {
        add(begin, at, Kind::kText);
      }
    } else if (kPunctuation.find(c) == kNone) {
      at = std::min(json.find_first_of(kPunctuation, at), json.size());
      add(begin, at, Kind::kScalar);
    }
  }
  return spans;
}

// What parsers are known to disagree on, and what has no place.
std::string Token(Dice& dice) {
  static const std::vector<std::string> tokens = {
      "\0"s,
      "\0x"s,
      "\xEF\xBB\xBF",
      "-0",
      "-1",
      "1.0",
      "1E2",
      "1e400",
      "NaN",
      "null",
      "true",
      "\"\"",
      "\\u0000",
      "\\ud800",
      "\\u00e4",
      "/**/",
      "//\n",
      ",",
      ":",
      "{",
      "}",
      "[",
      "]",
      "{}",
      "[]",
      "[[[[[[[[[[1]]]]]]]]]]",
      "\"",
      "\\",
      "\xC3",
      "\xC3\xA4",
      "\xED\xA0\x80",
      "\xF4\x90\x80\x80",
      "\x7F",
      "\n",
      " ",
      "0",
      "00",
      "9223372036854775807",
      "18446744073709551615",
      "99999999999999999999",
  };
  const int64_t at = dice.Below(std::ssize(tokens) + 12);
  if (at < std::ssize(tokens)) return tokens[static_cast<size_t>(at)];
  switch (at % 4) {
    case 0:
      return "\"" + std::string(static_cast<size_t>(dice.Below(300)), 'a') +
             "\"";
    case 1:
      return std::to_string(dice.Below(100));
    default:
      // Around powers of two, where sums and products overflow.
      return std::to_string((int64_t{1} << dice.Below(63)) + dice.Below(3) - 1);
  }
}

// False if it is no number.
bool ChangeNumber(std::string& text, const Span& span, Dice& dice) {
  int64_t value = 0;
  const char* begin = text.data() + span.begin;
  const auto [end, error] =
      std::from_chars(begin, text.data() + span.end, value);
  if (error != std::errc() || end != text.data() + span.end) return false;
  // Unsigned, where an overflow is none.
  const auto bits = static_cast<uint64_t>(value);
  const std::array<uint64_t, 12> changed = {
      bits + 1,          bits - 1,          bits * 2,
      bits / 2,          bits + 4,          bits - 4,
      bits + 64,         0 - bits,          INT64_MAX,
      uint64_t{1} << 63, uint64_t{1} << 62, uint64_t{1} << dice.Below(64)};
  const auto next = static_cast<int64_t>(
      changed[static_cast<size_t>(dice.Below(std::ssize(changed)))]);
  text.replace(span.begin, span.size(), std::to_string(next));
  return true;
}

void Erase(std::string& text, Span span) {
  const size_t next = text.find_first_not_of(" \n\t", span.end);
  if (next != std::string::npos && text[next] == ',') {
    span.end = next + 1;
  } else if (span.begin > 0) {
    const size_t before = text.find_last_not_of(" \n\t", span.begin - 1);
    if (before != std::string::npos && text[before] == ',') {
      span.begin = before;
    }
  }
  text.erase(span.begin, span.size());
}

void Swap(std::string& text, Span a, Span b) {
  if (a.begin > b.begin) std::swap(a, b);
  if (a.end > b.begin) return;
  const std::string first = text.substr(a.begin, a.size());
  const std::string second = text.substr(b.begin, b.size());
  text.replace(b.begin, b.size(), first);
  text.replace(a.begin, a.size(), second);
}

void ChangeBytes(std::string& text, Dice& dice) {
  const size_t at = dice.Position(text);
  switch (dice.Below(3)) {
    case 0:
      text.insert(at, Token(dice));
      return;
    case 1:
      text.insert(at, text.substr(dice.Position(text),
                                  static_cast<size_t>(dice.Below(40))));
      return;
    default:
      MutatePart(text, dice);
  }
}

// What UnsealJson wants at the end.
constexpr std::string_view kSealBegin = ",\n \"digest\": \"";
constexpr std::string_view kSealEnd = "\"\n}\n";
constexpr size_t kSealBytes =
    kSealBegin.size() + kDigestDigits + kSealEnd.size();

std::string_view Body(const std::string& text) {
  return std::string_view(text).substr(
      0, text.size() - std::min(text.size(), kSealBytes));
}

std::string WithSeal(std::string body) {
  const std::string digest = DigestOf(body);
  body.append(kSealBegin).append(digest).append(kSealEnd);
  return body;
}

}  // namespace

void MutateJson(std::string& text, Dice& dice) {
  const std::vector<Span> spans = SpansOf(text);
  if (spans.empty() || dice.OneIn(4)) {
    ChangeBytes(text, dice);
    return;
  }
  const auto any = [&] {
    return spans[static_cast<size_t>(dice.Below(std::ssize(spans)))];
  };
  const Span span = any();
  switch (dice.Below(8)) {
    case 0:
      Erase(text, span);
      return;
    case 1:
      text.insert(span.end, "," + text.substr(span.begin, span.size()));
      return;
    case 2:
      Swap(text, span, any());
      return;
    case 3: {
      const Span other = any();
      text.replace(span.begin, span.size(),
                   text.substr(other.begin, other.size()));
      return;
    }
    case 4:
      text.replace(span.begin, span.size(), Token(dice));
      return;
    default:
      if (span.kind == Kind::kScalar && ChangeNumber(text, span, dice)) return;
      if ((span.kind == Kind::kText || span.kind == Kind::kKey) &&
          span.size() > 2) {
        MutateRange(text, span.begin + 1, span.end - 1);
        return;
      }
      text.replace(span.begin, span.size(), Token(dice));
  }
}

void MutateSealed(std::string& text, Dice& dice) {
  // A whole object while it is changed.
  std::string body = std::string(Body(text)) + '}';
  MutateJson(body, dice);
  if (body.ends_with('}')) body.pop_back();
  text = WithSeal(std::move(body));
}

void Seal(std::string& text) { text = WithSeal(std::string(Body(text))); }

}  // namespace gradwire
