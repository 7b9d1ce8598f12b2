// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/merge.h"

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checkpoint/delta/delta_testing.h"

namespace gradwire {
namespace {

constexpr int64_t kChunk = kChunkElements;

TestWeights Base(std::mt19937& random) {
  TestWeights base;
  base.Add({"w", "BF16", {3 * kChunk + 4}}, FloatBytes{random});
  base.Add({"norm", "F32", {70}}, FloatBytes{random});
  base.Add({"kept", "BF16", {10}}, FloatBytes{random});
  base.Add({"once", "F32", {2 * kChunk}}, FloatBytes{random});
  return base;
}

DeltaFile Delta(const TestWeights& before, const TestWeights& after,
                int64_t chain_length = 1) {
  DeltaOptions options = OptionsFor(before);
  options.chain_length = chain_length;
  auto file =
      DeltaFile::Parse(*EncodeDelta(before.views(), after.views(), options));
  EXPECT_TRUE(file.ok()) << file.status();
  return *std::move(file);
}

// The deltas between consecutive `states`, merged, make the last of the first.
void ExpectMerge(const std::vector<TestWeights>& states) {
  std::vector<std::unique_ptr<DeltaFile>> deltas;
  std::vector<const DeltaFile*> pointers;
  for (size_t i = 1; i < states.size(); ++i) {
    deltas.push_back(std::make_unique<DeltaFile>(
        Delta(states[i - 1], states[i], static_cast<int64_t>(i))));
    pointers.push_back(deltas.back().get());
  }
  const auto merged = MergeDeltas(pointers);
  ASSERT_TRUE(merged.ok()) << merged.status();
  const auto delta = DeltaFile::Parse(*merged);
  ASSERT_TRUE(delta.ok()) << delta.status();
  EXPECT_EQ(delta->info().chain_length, 1);
  EXPECT_EQ(delta->info().id, states.back().id());
  // Fresh tensors have no old values to take over.
  TestWeights weights = states.back();
  const TestWeights& first = states.front();
  for (size_t i = 0; i < weights.size(); ++i) {
    std::memset(weights.data(i), 0x77, static_cast<size_t>(weights.bytes(i)));
    for (size_t j = 0; j < first.size(); ++j) {
      if (first.info(j) == weights.info(i)) {
        std::memcpy(weights.data(i), first.data(j),
                    static_cast<size_t>(first.bytes(j)));
      }
    }
  }
  std::string id = first.id();
  const absl::Status status = ApplyDelta(*delta, weights.tensors(), id);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(weights == states.back());
  EXPECT_EQ(id, states.back().id());
}

TEST(MergeTest, EqualsApplyingInTurn) {
  for (uint32_t seed = 0; seed < 8; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    std::vector<TestWeights> states = {Base(random)};
    const int steps = 1 + static_cast<int>(seed % 4);
    for (int step = 0; step < steps; ++step) {
      TestWeights next = states.back();
      const double density = std::vector{0.0, 0.01, 0.3, 0.9}[random() % 4];
      ChangeSome(next.data<uint16_t>(0), 3 * kChunk + 4, density, random, 0.1);
      if (random() % 2) next.data(1)[random() % 280] ^= 9;
      if (step == 0) next.data(3)[4 * kChunk] ^= 1;
      states.push_back(next);
    }
    ExpectMerge(states);
  }
}

TEST(MergeTest, WhatIsUndoneIsNotThere) {
  std::mt19937 random(9);
  const TestWeights base = Base(random);
  TestWeights away = base;
  ChangeSome(away.data<uint16_t>(0), 3 * kChunk, 0.1, random, 0.5);
  const DeltaFile there = Delta(base, away), back = Delta(away, base);
  const auto merged = DeltaFile::Parse(*MergeDeltas({&there, &back}));
  ASSERT_TRUE(merged.ok());
  EXPECT_EQ(merged->info().id, base.id());
  for (const DeltaTensor& tensor : merged->tensors()) {
    EXPECT_FALSE(tensor.changed()) << tensor.info.name;
  }
}

TEST(MergeTest, FreshTensorsChangeAndGo) {
  std::mt19937 random(10);
  TestWeights one, two, three, four;
  one.Add({"a", "BF16", {9}}, FloatBytes{random});
  one.Add({"b", "BF16", {9}}, FloatBytes{random});
  one.Add({"c", "BF16", {9}}, FloatBytes{random});
  two.Add({"a", "BF16", {9}}, FloatBytes{random});   // changed
  two.Add({"b", "F32", {9}}, FloatBytes{random});    // retyped
  two.Add({"d", "BF16", {99}}, FloatBytes{random});  // new
  three = two;
  ++three.data<uint16_t>(2)[50];
  four = three;
  ++four.data<uint16_t>(0)[3];
  ExpectMerge({one, two, three, four});
}

TEST(MergeTest, DeltasThatDoNotFollowAreRefused) {
  std::mt19937 random(11);
  const TestWeights base = Base(random);
  TestWeights next = base, other = base;
  ++next.data<uint16_t>(0)[0];
  ++other.data<uint16_t>(0)[1];
  const DeltaFile a = Delta(base, next), b = Delta(other, base);
  const auto merged = MergeDeltas({&a, &b});
  EXPECT_EQ(merged.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(merged.status()), "DELTA_PARENT_MISMATCH");
  EXPECT_EQ(ReasonOf(MergeDeltas({}).status()), "DELTA_INVALID");
}

TEST(MergeTest, OtherShardsAreRefused) {
  std::mt19937 random(12);
  const TestWeights base = Base(random);
  TestWeights next = base, last = base;
  ++next.data<uint16_t>(0)[0];
  const DeltaFile a = Delta(base, next);
  DeltaOptions options = OptionsFor(next);
  options.shard_begins["w"] = {kChunk};
  const auto b =
      DeltaFile::Parse(*EncodeDelta(next.views(), last.views(), options));
  EXPECT_EQ(ReasonOf(MergeDeltas({&a, &*b}).status()), "DELTA_SHARDS_DIFFER");
}

}  // namespace
}  // namespace gradwire
