// SPDX-License-Identifier: Apache-2.0
// What the libFuzzer targets share. A target defines the three functions
// below; fuzz.cc has libFuzzer's entry points. An input is always what the
// reader under test gets, so the file that a finding leaves is one that can be
// fed to that reader as it is. docs/fuzzing.md is the page.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace gradwire {

// The choices of one mutation.
class Dice {
 public:
  explicit Dice(uint32_t seed) : random_(seed) { random_.discard(1); }
  // From 0 to n - 1. REQUIRES: n > 0.
  int64_t Below(int64_t n) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(n));
  }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  // How many parts of an input to change: mostly one, since two hardly ever
  // leave a valid one.
  int64_t Changes() { return OneIn(3) ? 2 + Below(2) : 1; }
  // Of a byte, or the end.
  size_t Position(std::string_view text) {
    return static_cast<size_t>(Below(std::ssize(text) + 1));
  }

 private:
  std::minstd_rand random_;
};

// A valid input.
std::string FuzzSeed(Dice& dice);
// Changes a few parts of an input, and mostly makes lengths, checksums and
// digests right again: a change that these betray never gets behind them.
void FuzzMutate(std::string& input, Dice& dice);
// Reads the input, and aborts (GW_CHECK) if a promise is broken.
void FuzzOne(const std::string& input);

// An input that was not refused. Their number is printed at the end: a target
// that hardly has any looks at half of its code only.
void CountAccepted();

// Lets libFuzzer change bytes [begin, end), which may become longer or shorter.
void MutateRange(std::string& text, size_t begin, size_t end);
// The same of a part of it, of at most 32 bytes.
void MutatePart(std::string& text, Dice& dice);
// A JSON text, or what is left of one: bytes of it, or a value, a member or an
// element.
void MutateJson(std::string& text, Dice& dice);

// A text that ends with its digest (checkpoint/sealed_text.h), which is made
// right again.
void MutateSealed(std::string& text, Dice& dice);
// The text with the digest that its content has.
void Seal(std::string& text);

// Aborts unless the memory that is allocated while it lives, all blocks added
// up, is at most `fixed` + `times` * `input_bytes`.
class BoundedMemory {
 public:
  BoundedMemory(int64_t fixed, int64_t times, size_t input_bytes);
  BoundedMemory(const BoundedMemory&) = delete;
  BoundedMemory& operator=(const BoundedMemory&) = delete;
  ~BoundedMemory();

 private:
  const int64_t begin_, limit_;
};

// Aborts unless an error is one of the two codes of files that are not right,
// and says so in a message of a bounded length.
void CheckRefusal(const absl::Status& status);

}  // namespace gradwire
