// SPDX-License-Identifier: Apache-2.0
// Snapshots that are not as they were saved.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/sealed_text.h"
#include "checkpoint/snapshot/image.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/snapshot/manifest.h"
#include "checkpoint/snapshot/snapshot_fixture.h"

namespace gradwire {
namespace {

TEST_F(SnapshotTest, AReplacedParentIsFound) {
  const TestWeights weights = MakeWeights(1);
  Must(Save("a", weights));
  Must(Save("b", Step(weights, 1), {.kind = SnapshotKind::kDelta}));
  DiskImage image = files_->Latest();
  for (const char* file :
       {"snapshot.json", "model.safetensors", "config.json"}) {
    image.files.erase(std::string("/s/a/") + file);
  }
  image.directories.erase("/s/a");
  Replace(image);
  EXPECT_EQ(ReadReason("b"), "DELTA_PARENT_UNAVAILABLE");
  Must(Save("a", Step(weights, 7)));
  EXPECT_EQ(ReadReason("b"), "DELTA_PARENT_MISMATCH");
}

TEST_F(SnapshotTest, AnyFlippedBitIsFound) {
  const TestWeights weights = MakeWeights(1);
  Must(Save("a", weights));
  Must(Save("b", Step(weights, 1), {.kind = SnapshotKind::kDelta}));
  const DiskImage good = files_->Latest();
  int64_t flips = 0;
  for (const auto& [path, content] : good.files) {
    for (size_t at = 0; at < content.size(); ++at) {
      DiskImage bad = good;
      bad.files[path][at] ^= static_cast<char>(1 << (at % 8));
      Replace(bad);
      const std::string reason = ReadReason("b");
      ASSERT_TRUE(reason == "CHECKPOINT_CORRUPT" ||
                  reason == "DELTA_PARENT_UNAVAILABLE")
          << path << " " << at << " " << reason;
      ++flips;
    }
    for (size_t size = 0; size < content.size(); size += 7) {
      DiskImage bad = good;
      bad.files[path].resize(size);
      Replace(bad);
      ASSERT_NE(ReadReason("b"), "") << path << " " << size;
    }
  }
  EXPECT_GT(flips, 2000);
}

TEST_F(SnapshotTest, OneThatGoesWhileItIsReadIsNoFaultOfTheDisk) {
  Must(Save("a", MakeWeights(1)));
  const auto chain = ReadChain(*files_, "/s", "a");
  ASSERT_TRUE(chain.ok()) << chain.status();
  ASSERT_TRUE(RemoveSnapshot(*files_, "/s", "a").ok());
  EXPECT_EQ(
      ReasonOf(SnapshotImage::Read(*files_, "/s", *chain, INT64_MAX).status()),
      "CHECKPOINT_CORRUPT");
}

// Texts that declare what is not there, with digests that are right.
TEST_F(SnapshotTest, HostileManifestsAreRefused) {
  Must(Save("a", MakeWeights(1)));
  Must(Save("b", MakeWeights(1), {.kind = SnapshotKind::kDelta}));
  const std::string path = "/s/b/snapshot.json";
  const nlohmann::json good = nlohmann::json::parse(Content(path));
  const auto reason = [&](const nlohmann::json& patch) {
    nlohmann::json json = good;
    json.erase("digest");
    json.merge_patch(patch);
    Overwrite(path, SealJson(json));
    return ReadReason("b");
  };
  EXPECT_EQ(reason(nlohmann::json::object()), "");
  const nlohmann::json file = {{"name", "delta.safetensors"},
                               {"bytes", int64_t{1} << 60},
                               {"digest", std::string(32, '0')}};
  const auto named = [&](const std::string& name) {
    nlohmann::json other = file;
    other["name"] = name;
    return nlohmann::json::array({file, other});
  };
  for (const nlohmann::json& patch : std::vector<nlohmann::json>{
           {{"name", "c"}},
           {{"format", "gradwire training state"}},
           {{"kind", "lora"}},
           {{"parent", "../a"}},
           {{"parent", ".a"}},
           {{"parent", ""}},
           {{"parent", nullptr}},
           {{"parent_id", "12"}},
           {{"weight_id", std::string(32, 'f')}},
           {{"chain_length", 0}},
           {{"chain_length", -1}},
           {{"chain_length", 1.5}},
           {{"optimizer_step", -1}},
           {{"created", "yesterday"}},
           {{"created", "2026-01-31T23:59:59Z"}},
           {{"expires", "2026-13-31T23:59:59.000000Z"}},
           {{"files", nlohmann::json::array()}},
           {{"files", nlohmann::json::array({file})}},
           {{"files", named("delta.safetensors")}},
           {{"files", named("../a/model.safetensors")}},
           {{"files", named("snapshot.json")}},
           {{"files", named("")}},
           {{"files", named("a/b")}},
           {{"files", 3}},
           {{"extra", 1}},
       }) {
    EXPECT_EQ(reason(patch), "CHECKPOINT_CORRUPT") << patch;
  }
  EXPECT_EQ(reason({{"version", 2}}), "CHECKPOINT_CORRUPT");
  EXPECT_EQ(reason({{"version", 3}}), "STATE_VERSION");
  // A ring.
  EXPECT_EQ(reason({{"parent", "b"}, {"parent_id", good["weight_id"]}}),
            "CHECKPOINT_CORRUPT");
  Overwrite(path, std::string(3 << 20, ' '));
  EXPECT_EQ(ReadReason("b"), "CHECKPOINT_CORRUPT");
}

TEST(SnapshotManifestTest, SizesThatHaveNoSumAreRefused) {
  SnapshotManifest manifest;
  manifest.name = "a";
  manifest.weight_id = std::string(32, 'a');
  manifest.created_micros = 1;
  const std::string digest(32, 'd');
  manifest.files = {{kBaseWeights, INT64_MAX - 5, digest},
                    {"config.json", 5, digest}};
  const auto most = ParseSnapshot(SnapshotText(manifest));
  ASSERT_TRUE(most.ok()) << most.status();
  EXPECT_EQ(most->bytes(), INT64_MAX);
  manifest.files[1].bytes = 6;
  EXPECT_EQ(ParseSnapshot(SnapshotText(manifest)).status().code(),
            absl::StatusCode::kDataLoss);
}

// The files are as their digests say, and are other weights than the id names.
TEST_F(SnapshotTest, AWrongWeightIdIsFound) {
  Must(Save("a", MakeWeights(1)));
  nlohmann::json json = nlohmann::json::parse(Content("/s/a/snapshot.json"));
  json.erase("digest");
  json["weight_id"] = std::string(32, '7');
  Overwrite("/s/a/snapshot.json", SealJson(json));
  EXPECT_EQ(ReadReason("a"), "CHECKPOINT_CORRUPT");
}

}  // namespace
}  // namespace gradwire
