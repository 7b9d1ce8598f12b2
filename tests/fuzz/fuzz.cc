// SPDX-License-Identifier: Apache-2.0
#include "tests/fuzz/fuzz.h"

#include <sanitizer/allocator_interface.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/error.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace gradwire {
namespace {

// To make a seed takes longer than to read it: they are drawn from this many,
// of which each run makes others.
constexpr int64_t kSeeds = 2000;
// By how much a change of bytes may make them longer.
constexpr size_t kRoom = 16;

int64_t allocated = 0;
int64_t accepted = 0;

void CountAllocation(const volatile void*, size_t bytes) {
  allocated += static_cast<int64_t>(bytes);
}
void IgnoreFree(const volatile void*) {}

const std::string& AnySeed(Dice& dice) {
  static std::vector<std::string> seeds(kSeeds);
  std::string& seed = seeds[static_cast<size_t>(dice.Below(kSeeds))];
  if (seed.empty()) seed = FuzzSeed(dice);
  return seed;
}

void PrintAccepted() {
  std::fprintf(stderr, "stat::accepted_inputs: %lld\n",
               static_cast<long long>(accepted));
}

}  // namespace

void CountAccepted() { ++accepted; }

void MutateRange(std::string& text, size_t begin, size_t end) {
  std::string part = text.substr(begin, end - begin);
  const size_t size = part.size();
  part.resize(size + kRoom);
  part.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(part.data()), size,
                               part.size()));
  text.replace(begin, size, part);
}

void MutatePart(std::string& text, Dice& dice) {
  const size_t begin = dice.Position(text);
  const int64_t most =
      std::min<int64_t>(std::ssize(text) - static_cast<int64_t>(begin), 32);
  MutateRange(text, begin, begin + static_cast<size_t>(dice.Below(most + 1)));
}

BoundedMemory::BoundedMemory(int64_t fixed, int64_t times, size_t input_bytes)
    : begin_(allocated),
      limit_(fixed + times * static_cast<int64_t>(input_bytes)) {}

BoundedMemory::~BoundedMemory() {
  const int64_t bytes = allocated - begin_;
  if (bytes > limit_) {
    std::fprintf(stderr, "%lld bytes were allocated, the limit is %lld\n",
                 static_cast<long long>(bytes), static_cast<long long>(limit_));
  }
  GW_CHECK(bytes <= limit_);
}

void CheckRefusal(const absl::Status& status) {
  GW_CHECK(status.code() == absl::StatusCode::kInvalidArgument ||
           status.code() == absl::StatusCode::kDataLoss ||
           status.code() == absl::StatusCode::kFailedPrecondition ||
           status.code() == absl::StatusCode::kNotFound);
  const auto detail = GetErrorDetail(status);
  GW_CHECK(detail.has_value() && !detail->reason.empty());
  // It travels in the header of a reply.
  size_t bytes = status.message().size();
  for (const auto& [key, value] : detail->metadata) {
    bytes += key.size() + value.size();
  }
  GW_CHECK(bytes <= 2000);
}

}  // namespace gradwire

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit(gradwire::PrintAccepted);
  __sanitizer_install_malloc_and_free_hooks(gradwire::CountAllocation,
                                            gradwire::IgnoreFree);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  gradwire::FuzzOne(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size,
                                          size_t max_size, unsigned seed) {
  gradwire::Dice dice(seed);
  std::string input(reinterpret_cast<const char*>(data), size);
  // A corpus need not exist: what is empty becomes a sample. And most of a
  // corpus is refused for one reason each; a second one behind it is not seen.
  if (size <= 1 || dice.OneIn(3)) input = gradwire::AnySeed(dice);
  if (dice.OneIn(10)) {
    gradwire::MutateRange(input, 0, input.size());
  } else if (!dice.OneIn(100)) {
    gradwire::FuzzMutate(input, dice);
  }
  size = std::min(input.size(), max_size);
  memcpy(data, input.data(), size);
  return size;
}
