// SPDX-License-Identifier: Apache-2.0
// Bases whose weights are in several files.
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/sealed_text.h"
#include "checkpoint/snapshot/base_writer.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/snapshot/promote.h"
#include "checkpoint/snapshot/snapshot_fixture.h"

namespace gradwire {
namespace {

using Ends = std::vector<size_t>;

constexpr int64_t kLimits[] = {1, 28, 31, 88, 100, 204, 303, 304, kShardBytes};

class ShardsTest : public SnapshotTest {
 protected:
  // What a directory has beside its manifest and config.json.
  std::map<std::string, std::string> WeightFiles(const std::string& directory) {
    std::map<std::string, std::string> found;
    for (const auto& [path, content] : files_->Latest().files) {
      if (DirectoryOf(path) != directory) continue;
      const std::string name = LastSegment(path);
      if (name != "snapshot.json" && name != "config.json") {
        found[name] = content;
      }
    }
    return found;
  }
};

TEST(SplitShardsTest, FillsFilesInOrder) {
  // 28, 60, 200, 4 and 12 bytes.
  const std::vector<TensorInfo> tensors = MakeLayers().infos;
  for (const auto& [limit, ends] :
       std::vector<std::pair<int64_t, Ends>>{{1, {1, 2, 3, 4, 5}},
                                             {28, {1, 2, 3, 5}},
                                             {87, {1, 2, 3, 5}},
                                             {88, {2, 3, 5}},
                                             {203, {2, 3, 5}},
                                             {204, {2, 4, 5}},
                                             {216, {2, 5}},
                                             {287, {2, 5}},
                                             {288, {3, 5}},
                                             {303, {4, 5}},
                                             {304, {5}},
                                             {INT64_MAX, {5}}}) {
    EXPECT_EQ(*SplitShards(tensors, limit), ends) << limit;
  }
  EXPECT_EQ(*SplitShards({}, 1), Ends{0});
}

TEST(SplitShardsTest, ThereIsAMostOfFiles) {
  std::vector<TensorInfo> tensors(kMaxShards, {"x", "F32", {1}});
  EXPECT_EQ(SplitShards(tensors, 4)->size(), size_t{kMaxShards});
  tensors.push_back(tensors.front());
  EXPECT_EQ(SplitShards(tensors, 8)->size(), size_t{kMaxShards / 2 + 1});
  EXPECT_EQ(ReasonOf(SplitShards(tensors, 7).status()), "OPTION_OUT_OF_RANGE");
}

TEST(SplitShardsTest, FilesHaveTheNamesThatOthersGiveThem) {
  EXPECT_EQ(BaseWeightsName(1, 1), "model.safetensors");
  EXPECT_EQ(BaseWeightsName(1, 2), "model-00001-of-00002.safetensors");
  EXPECT_EQ(BaseWeightsName(12, 345), "model-00012-of-00345.safetensors");
}

TEST_F(ShardsTest, ABaseIsInAsManyFilesAsItNeeds) {
  const TestWeights weights = MakeLayers();
  std::string weight_id;
  for (const int64_t limit : kLimits) {
    SCOPED_TRACE(limit);
    const std::string name = "s" + std::to_string(limit);
    const SnapshotManifest saved =
        Must(Save(name, weights, {.shard_bytes = limit}));
    EXPECT_EQ(WeightFiles("/s/" + name), weights.Files(limit));
    EXPECT_EQ(Read(name), weights.File());
    // Nothing else says how it is stored.
    if (weight_id.empty()) weight_id = saved.weight_id;
    EXPECT_EQ(saved.weight_id, weight_id);
    int64_t bytes = 0;
    std::string digests;
    for (const SnapshotFile& file : saved.weights()) {
      bytes += file.bytes;
      digests += file.digest;
      EXPECT_EQ(file.digest, DigestOf(Content("/s/" + name + "/" + file.name)));
    }
    EXPECT_EQ(saved.weight_bytes(), bytes);
    const bool one = saved.weights().size() == 1;
    EXPECT_EQ(saved.weight_digest(), one ? digests : DigestOf(digests));
    const auto json =
        nlohmann::json::parse(Content("/s/" + name + "/snapshot.json"));
    EXPECT_EQ(json["version"], one ? 1 : 2);
    EXPECT_EQ(json["files"].size(),
              weights.Files(limit).size() + 1);  // config.json
    EXPECT_EQ(*ReadSnapshot(*files_, "/s", name), saved);
  }
}

// A tensor that comes in pieces, between two others.
TEST_F(ShardsTest, ALargeTensorIsInAFileOfItsOwn) {
  TestWeights weights = MakeLayers();
  weights.infos[1].shape = {kSnapshotPieceElements + 7};
  weights.values[1].assign(2 * (kSnapshotPieceElements + 7), '\5');
  const SnapshotManifest saved =
      Must(Save("a", weights, {.shard_bytes = 1000}));
  EXPECT_EQ(saved.weights().size(), 3u);
  EXPECT_TRUE(WeightFiles("/s/a") == weights.Files(1000));
}

// Whatever the base's files, deltas are the same, and so are the files that
// full weights become.
TEST_F(ShardsTest, AChainIsByteForByteWhatABaseWouldHaveBeen) {
  std::string delta;
  for (const int64_t limit : kLimits) {
    SCOPED_TRACE(limit);
    Replace(EmptyDisk());
    TestWeights weights = MakeLayers();
    Must(Save("s0", weights, {.shard_bytes = limit}));
    for (uint32_t i = 1; i <= 4; ++i) {
      weights = Step(weights, i);
      // The limit of a server that has been started anew.
      Must(Save("s" + std::to_string(i), weights,
                {.kind = SnapshotKind::kDelta, .shard_bytes = 7}));
    }
    EXPECT_EQ(Read("s4"), weights.File());
    if (delta.empty()) delta = Content("/s/s4/delta.safetensors");
    EXPECT_EQ(Content("/s/s4/delta.safetensors"), delta);
    for (const int64_t other : kLimits) {
      SCOPED_TRACE(other);
      const std::string id = "m" + std::to_string(other);
      PromoteRequest request{.directory = "/s",
                             .name = "s4",
                             .source = "s4",
                             .models_directory = "/m",
                             .model_id = id,
                             .now_micros = 5,
                             .shard_bytes = other};
      const SnapshotManifest model = Must(PromoteSnapshot(*files_, request));
      const SnapshotManifest direct =
          Must(Save(id, weights, {.shard_bytes = other}));
      EXPECT_EQ(WeightFiles("/m/" + id), WeightFiles("/s/" + id));
      EXPECT_EQ(Content("/m/" + id + "/config.json"), "{}");
      EXPECT_EQ(model.files, direct.files);
      EXPECT_EQ(model.weight_id, direct.weight_id);
      EXPECT_EQ(*ReadTestSnapshot(*files_, "/m", id), weights.File());
      // Once it is there, it is not made anew for another limit.
      request.shard_bytes = 31;
      EXPECT_EQ(Must(PromoteSnapshot(*files_, request)), model);
    }
  }
}

TEST_F(ShardsTest, MemoryIsThatOfAllFiles) {
  const TestWeights weights = MakeLayers();
  const int64_t bytes =
      Must(Save("a", weights, {.shard_bytes = 31})).weight_bytes();
  TestSave save{.kind = SnapshotKind::kDelta, .memory_bytes = bytes - 1};
  EXPECT_EQ(ReasonOf(Save("b", weights, save).status()), "OUT_OF_MEMORY");
  save.memory_bytes = bytes;
  Must(Save("b", weights, save));
}

TEST_F(ShardsTest, AutoCountsAllFilesOfTheBase) {
  TestWeights weights = MakeWeights(40'000);
  TestSave save{.kind = SnapshotKind::kAuto, .shard_bytes = 600'000};
  std::string kinds;
  for (int i = 0; i < 28; ++i) {
    const SnapshotManifest saved =
        Must(Save("s" + std::to_string(i), weights, save));
    kinds += saved.is_delta ? 'd' : 'b';
    EXPECT_EQ(saved.weights().size(), saved.is_delta ? 1u : 2u);
    weights.values[0][static_cast<size_t>(i)] ^= 1;
  }
  EXPECT_EQ(kinds, "b" + std::string(25, 'd') + "bd");
}

TEST_F(ShardsTest, TooManyFilesAreRefusedAndNothingIsLeft) {
  TestWeights weights;
  for (int64_t i = 0; i <= kMaxShards; ++i) {
    weights.infos.push_back({"t" + std::to_string(i), "BF16", {1}});
    weights.values.push_back("ab");
  }
  EXPECT_EQ(ReasonOf(Save("a", weights, {.shard_bytes = 1}).status()),
            "OPTION_OUT_OF_RANGE");
  EXPECT_EQ(*files_->List("/s"), std::vector<std::string>());
  weights.infos.pop_back();
  weights.values.pop_back();
  // As many as there may be, in a manifest that can be read.
  EXPECT_EQ(Must(Save("a", weights, {.shard_bytes = 1})).weights().size(),
            size_t{kMaxShards});
  EXPECT_EQ(Read("a"), weights.File());
  ASSERT_TRUE(RemoveSnapshot(*files_, "/s", "a").ok());
  EXPECT_EQ(*files_->List("/s"), std::vector<std::string>());
}

}  // namespace
}  // namespace gradwire
