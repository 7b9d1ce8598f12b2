// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "checkpoint/sealed_text.h"
#include "checkpoint/snapshot/diff.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/snapshot/promote.h"
#include "checkpoint/snapshot/snapshot_fixture.h"

namespace gradwire {
namespace {

TEST_F(SnapshotTest, ABaseIsAModelAndSaysWhatItIs) {
  const TestWeights weights = MakeWeights(3);
  const SnapshotManifest saved =
      Must(Save("first", weights, {.operation = "m.1", .ttl_seconds = 2.5}));
  EXPECT_EQ(Content("/s/first/model.safetensors"), weights.File());
  EXPECT_EQ(Read("first"), weights.File());
  EXPECT_EQ(saved.name, "first");
  EXPECT_EQ(saved.job, "job");
  EXPECT_EQ(std::string(saved.kind()), "base");
  EXPECT_EQ(saved.optimizer_step, 3);
  EXPECT_EQ(saved.weight_version, 4);
  EXPECT_EQ(saved.dtype, "BF16");
  EXPECT_EQ(saved.operation, "m.1");
  EXPECT_EQ(saved.expires_micros, saved.created_micros + 2'500'000);
  EXPECT_EQ(FormatMicros(saved.created_micros), "2001-09-09T01:46:40.000000Z");
  std::vector<TensorView> views;
  for (size_t i = 0; i < weights.infos.size(); ++i) {
    views.push_back({weights.infos[i], weights.values[i].data()});
  }
  EXPECT_EQ(saved.weight_id, ComputeWeightId(views));
  ASSERT_EQ(saved.files.size(), 2u);
  for (const SnapshotFile& file : saved.files) {
    const std::string content = Content("/s/first/" + file.name);
    EXPECT_EQ(file.bytes, std::ssize(content));
    EXPECT_EQ(file.digest, DigestOf(content));
  }
  EXPECT_EQ(*ReadSnapshot(*files_, "/s", "first"), saved);
  EXPECT_EQ(*ParseSnapshot(SnapshotText(saved)), saved);
}

class ChainTest : public SnapshotTest,
                  public testing::WithParamInterface<const char*> {};

INSTANTIATE_TEST_SUITE_P(DTypes, ChainTest, testing::Values("BF16", "F32"));

// A base export at each place would have been these bytes.
TEST_P(ChainTest, ThirtyDeltasGiveTheFullExportByteForByte) {
  // Several chunks.
  TestWeights weights = MakeWeights(200'000, GetParam());
  Must(Save("s0", weights));
  const int64_t full = std::ssize(weights.File());
  std::string parent_id = Must(ReadSnapshot(*files_, "/s", "s0")).weight_id;
  const std::string base_id = parent_id;
  for (int i = 1; i <= 30; ++i) {
    // Few changes, at far places.
    for (std::string& value : weights.values) {
      value[static_cast<size_t>(i * 991)] ^= 1;
      value[value.size() - static_cast<size_t>(i)] ^= 64;
    }
    const SnapshotManifest saved = Must(
        Save("s" + std::to_string(i), weights, {.kind = SnapshotKind::kDelta}));
    EXPECT_EQ(saved.parent, "s" + std::to_string(i - 1));
    EXPECT_EQ(saved.parent_id, parent_id);
    EXPECT_EQ(saved.base_id, base_id);
    EXPECT_EQ(saved.chain_length, i);
    if (std::string(GetParam()) == "BF16") {
      EXPECT_LT(saved.bytes(), full / 50);
    }
    parent_id = saved.weight_id;
    if (i == 1 || i == 17) {
      EXPECT_TRUE(Read(saved.name) == weights.File());
    }
  }
  EXPECT_TRUE(Read("s30") == weights.File());
  // The id is that of a base with the same weights.
  EXPECT_EQ(Must(Save("again", weights)).weight_id, parent_id);
}

// A tensor that comes in more than one piece.
TEST_F(SnapshotTest, LargeTensorsComeInPieces) {
  TestWeights weights;
  weights.infos = {{"small", "BF16", {3}},
                   {"large", "BF16", {kSnapshotPieceElements + 70'001}},
                   {"last", "BF16", {1}}};
  std::mt19937 random(1);
  for (const TensorInfo& info : weights.infos) {
    std::string value(static_cast<size_t>(2 * info.num_elements()), '\0');
    // Nowhere the same as a piece before.
    for (char& byte : value) byte = static_cast<char>(random());
    weights.values.push_back(std::move(value));
  }
  Must(Save("a", weights));
  EXPECT_TRUE(Read("a") == weights.File());
  for (std::string& value : weights.values) value.back() ^= 3;
  weights.values[1][2 * kSnapshotPieceElements] ^= 5;
  // Compared with the elements of the same places, few have changed.
  EXPECT_LT(Must(Save("b", weights, {.kind = SnapshotKind::kDelta})).bytes(),
            5000);
  EXPECT_TRUE(Read("b") == weights.File());
  EXPECT_EQ(Must(Save("c", weights)).weight_id,
            Must(ReadSnapshot(*files_, "/s", "b")).weight_id);
}

TEST_F(SnapshotTest, AutoBeginsWithABaseAndComesBackToIt) {
  TestWeights weights = MakeWeights(40'000);
  TestSave save{.kind = SnapshotKind::kAuto};
  std::string kinds;
  for (int i = 0; i < 28; ++i) {
    kinds +=
        Must(Save("s" + std::to_string(i), weights, save)).is_delta ? 'd' : 'b';
    weights.values[0][static_cast<size_t>(i)] ^= 1;
  }
  EXPECT_EQ(kinds, "b" + std::string(25, 'd') + "bd");
}

TEST_F(SnapshotTest, AutoMakesABaseWhereADeltaCannotBe) {
  TestWeights weights = MakeWeights(2);
  TestSave save{.kind = SnapshotKind::kAuto};
  Must(Save("a", weights, save));
  // Deltas above half of the base. (Of a small model any delta is.)
  EXPECT_TRUE(Must(Save("b", Step(weights, 1), save)).is_delta);
  EXPECT_FALSE(Must(Save("c", Step(weights, 2), save)).is_delta);
  // Other tensors.
  EXPECT_FALSE(Must(Save("d", MakeWeights(3), save)).is_delta);
  // No memory.
  save.memory_bytes = 10;
  EXPECT_FALSE(Must(Save("e", MakeWeights(3), save)).is_delta);
  // A damaged parent.
  save.memory_bytes = INT64_MAX;
  Overwrite("/s/e/model.safetensors", "?");
  EXPECT_FALSE(Must(Save("f", MakeWeights(3), save)).is_delta);
  EXPECT_TRUE(Must(Save("g", MakeWeights(3), save)).is_delta);
}

TEST_F(SnapshotTest, ADeltaNeedsItsParent) {
  const TestWeights weights = MakeWeights(2);
  TestSave save{.kind = SnapshotKind::kDelta};
  EXPECT_EQ(ReasonOf(Save("x", weights, save).status()),
            "DELTA_PARENT_UNAVAILABLE");
  Must(Save("a", weights));
  Must(Save("b", Step(weights, 1)));
  save.parent = "nothing";
  EXPECT_EQ(ReasonOf(Save("x", weights, save).status()),
            "DELTA_PARENT_UNAVAILABLE");
  save.parent = "a";
  EXPECT_EQ(ReasonOf(Save("x", MakeWeights(3), save).status()),
            "DELTA_PARENT_MISMATCH");
  EXPECT_EQ(ReasonOf(Save("x", MakeWeights(2, "F32"), save).status()),
            "DELTA_PARENT_MISMATCH");
  save.memory_bytes = 10;
  EXPECT_EQ(ReasonOf(Save("x", weights, save).status()), "OUT_OF_MEMORY");
  save.memory_bytes = INT64_MAX;
  // Not the newest, but the one that was named.
  EXPECT_EQ(Must(Save("c", Step(weights, 2), save)).parent, "a");
  EXPECT_EQ(Read("c"), Step(weights, 2).File());
  std::string damaged = Content("/s/a/model.safetensors");
  damaged.back() ^= 1;
  Overwrite("/s/a/model.safetensors", damaged);
  EXPECT_EQ(ReasonOf(Save("x", weights, save).status()),
            "DELTA_PARENT_UNAVAILABLE");
  // Nothing is left of what was refused.
  EXPECT_EQ(*files_->List("/s"), (std::vector<std::string>{"a", "b", "c"}));
}

TEST_F(SnapshotTest, AnOperationThatIsSentAgainFindsWhatItMade) {
  const TestWeights weights = MakeWeights(1);
  const SnapshotManifest saved = Must(Save("a", weights, {.operation = "op"}));
  EXPECT_EQ(Must(Save("a", weights, {.operation = "op"})), saved);
  for (const TestSave& other : {TestSave{.operation = "other"}, TestSave{},
                                TestSave{.operation = "op", .step = 9}}) {
    EXPECT_EQ(ReasonOf(Save("a", weights, other).status()), "SNAPSHOT_EXISTS");
  }
  Must(Save("b", weights));
  EXPECT_EQ(ReasonOf(Save("b", weights).status()), "SNAPSHOT_EXISTS");
}

TEST_F(SnapshotTest, TheNewestIsTheLastSavedWhateverTheClockSays) {
  const TestWeights weights = MakeWeights(1);
  Must(Save("z", weights, {.now_micros = 5'000'000}));
  const SnapshotManifest later = Must(Save("a", weights, {.now_micros = 7}));
  EXPECT_EQ(later.created_micros, 5'000'001);
  EXPECT_EQ(Must(Save("b", weights, {.kind = SnapshotKind::kDelta})).parent,
            "a");
}

// The last sync of a save fails: it is there, and may go with the power, until
// the operation is sent again.
TEST_F(SnapshotTest, WhatASecondAttemptFindsOutlastsAPowerLoss) {
  const TestWeights weights = MakeWeights(1);
  Must(Save("a", weights));
  const DiskImage start = files_->Latest();
  const auto save = [&] {
    return Save("b", weights, {.operation = "op"}).status();
  };
  const auto promote = [&] {
    return PromoteSnapshot(*files_, {.directory = "/s",
                                     .name = "a",
                                     .source = "a",
                                     .models_directory = "/m",
                                     .model_id = "b",
                                     .now_micros = 1})
        .status();
  };
  for (const auto& [run, directory] :
       {std::pair(std::function(save), "/s"),
        std::pair(std::function(promote), "/m")}) {
    Replace(start);
    ASSERT_TRUE(run().ok());
    const int64_t calls = files_->calls();
    Replace(start);
    files_->FailAt(calls, CrashFileSystem::Fault::kIoError);
    EXPECT_EQ(ReasonOf(run()), "STORAGE_IO");
    EXPECT_TRUE(ReadTestSnapshot(*files_, directory, "b").ok());
    const auto losses = [&] {
      int64_t lost = 0;
      files_->ForEachPowerLoss(
          files_->num_events(), 50, 1, [&](const DiskImage& image) {
            CrashFileSystem disk(image);
            lost += ReadTestSnapshot(disk, directory, "b").ok() ? 0 : 1;
          });
      return lost;
    };
    EXPECT_GT(losses(), 0);
    EXPECT_TRUE(run().ok());
    EXPECT_EQ(losses(), 0);
  }
}

TEST_F(SnapshotTest, ADeltaBecomesAModelOfItsOwn) {
  const TestWeights weights = MakeWeights(2), stepped = Step(weights, 1);
  Must(Save("a", weights));
  const SnapshotManifest delta =
      Must(Save("b", stepped, {.kind = SnapshotKind::kDelta}));
  PromoteRequest request{.directory = "/s",
                         .name = "b",
                         .source = "from-b",
                         .models_directory = "/m",
                         .model_id = "mine",
                         .now_micros = 77};
  const SnapshotManifest model = Must(PromoteSnapshot(*files_, request));
  EXPECT_EQ(Content("/m/mine/model.safetensors"), stepped.File());
  EXPECT_EQ(Content("/m/mine/config.json"), "{}");
  EXPECT_EQ(model.weight_id, delta.weight_id);
  EXPECT_FALSE(model.is_delta);
  EXPECT_EQ(*ReadTestSnapshot(*files_, "/m", "mine"), stepped.File());
  EXPECT_EQ(Must(PromoteSnapshot(*files_, request)), model);
  request.source = "from-c";
  EXPECT_EQ(ReasonOf(PromoteSnapshot(*files_, request).status()),
            "MODEL_EXISTS");
  request.source = "from-b";
  // It stays when its source goes, and is not another's with that name.
  ASSERT_TRUE(RemoveSnapshot(*files_, "/s", "b").ok());
  EXPECT_EQ(Must(PromoteSnapshot(*files_, request)), model);
  Must(Save("b", weights));
  EXPECT_EQ(ReasonOf(PromoteSnapshot(*files_, request).status()),
            "MODEL_EXISTS");
  request.model_id = "other";
  request.name = "nothing";
  EXPECT_EQ(ReasonOf(PromoteSnapshot(*files_, request).status()),
            "CHECKPOINT_NOT_FOUND");
  EXPECT_EQ(*files_->List("/m"), (std::vector<std::string>{"mine"}));
}

TEST(SnapshotDiffTest, CountsWhatDiffers) {
  const uint16_t a[4] = {1, 2, 3, 4}, b[4] = {1, 0, 3, 5};
  const uint32_t wide[2] = {1, 2};
  const SnapshotDiff diff = DiffTensors({{{"x", "BF16", {4}}, a},
                                         {{"gone", "F32", {2}}, wide},
                                         {{"w", "F32", {2}}, wide}},
                                        {{{"w", "F32", {2}}, wide},
                                         {{"x", "BF16", {4}}, b},
                                         {{"new", "BF16", {2, 2}}, a}});
  EXPECT_EQ(diff.elements, 10);
  EXPECT_EQ(diff.changed, 6);
  ASSERT_EQ(diff.tensors.size(), 3u);
  EXPECT_EQ(diff.tensors[0].changed, 0);
  EXPECT_EQ(diff.tensors[1].changed, 2);
  EXPECT_FALSE(diff.tensors[1].fresh);
  EXPECT_EQ(diff.tensors[2].changed, 4);
  EXPECT_TRUE(diff.tensors[2].fresh);
  EXPECT_EQ(diff.removed, std::vector<std::string>{"gone"});
}

}  // namespace
}  // namespace gradwire
