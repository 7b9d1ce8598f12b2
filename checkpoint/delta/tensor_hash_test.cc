// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/tensor_hash.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "base/crc32c.h"
#include "checkpoint/delta/delta_testing.h"

namespace gradwire {
namespace {

constexpr int64_t kChunk = kChunkElements;

TEST(WeightIdTest, DependsOnEverythingButTheOrder) {
  std::mt19937 random(9);
  TestWeights weights;
  weights.Add({"a", "BF16", {2, 3}}, FloatBytes{random});
  weights.Add({"b", "F32", {kChunk + 1}}, FloatBytes{random});
  const std::string id = weights.id();
  std::vector<TensorView> views = weights.views();
  std::swap(views[0], views[1]);
  EXPECT_EQ(ComputeWeightId(views), id);
  std::vector<std::string> ids = {id};
  for (int change = 0; change < 5; ++change) {
    views = weights.views();
    if (change == 0) views[0].info.name = "c";
    if (change == 1) views[0].info.dtype = "F16";
    if (change == 2) views[0].info.shape = {3, 2};
    if (change == 3) views.pop_back();
    if (change == 4) weights.data(1)[4 * kChunk + 3] ^= 1;
    ids.push_back(ComputeWeightId(views));
  }
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::unique(ids.begin(), ids.end()), ids.end());
}

TEST(ChecksumsTest, PiecesGiveWhatTheWholeGives) {
  std::mt19937 random(1);
  std::string bytes(100'000, '\0');
  for (char& c : bytes) c = static_cast<char>(random());
  const int64_t size = static_cast<int64_t>(bytes.size());
  Checksums sums;
  for (const int64_t piece : {int64_t{1000}, int64_t{2048}, size}) {
    sums.Reset();
    for (int64_t at = 0; at < size; at += piece) {
      sums.Add(bytes.data() + at, std::min(piece, size - at));
    }
    EXPECT_EQ(sums.hash(), HashBytes128(bytes.data(), size));
    EXPECT_EQ(sums.crc(), Crc32c(bytes.data(), size));
  }
}

TEST(Hash128Test, HexComesBackAndNothingElseIsTaken) {
  const Hash128 hash = HashBytes128("abc", 3);
  // The published XXH3-128 of "abc" with seed 0.
  EXPECT_EQ(hash.Hex(), "06b05ab6733a618578af5f94892f3950");
  EXPECT_EQ(Hash128::FromHex(hash.Hex()), hash);
  EXPECT_FALSE(Hash128::FromHex("").has_value());
  EXPECT_FALSE(Hash128::FromHex(std::string(31, '0')).has_value());
  EXPECT_FALSE(Hash128::FromHex(std::string(32, 'A')).has_value());
  EXPECT_FALSE(Hash128::FromHex(std::string(31, '0') + "g").has_value());
}

}  // namespace
}  // namespace gradwire
