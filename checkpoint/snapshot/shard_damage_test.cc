// SPDX-License-Identifier: Apache-2.0
// Bases in shards that are not as they were saved.
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/sealed_text.h"
#include "checkpoint/snapshot/manifest.h"
#include "checkpoint/snapshot/snapshot_fixture.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

constexpr char kIndex[] = "/s/a/model.safetensors.index.json";
constexpr char kManifest[] = "/s/a/snapshot.json";

std::string Shard(int number) {
  return "model-0000" + std::to_string(number) + "-of-00003.safetensors";
}

// A base of three files, [28, 60], [200] and [4, 12] bytes, and a delta to it.
class ShardDamageTest : public SnapshotTest {
 protected:
  void SetUp() override {
    Must(Save("a", weights_, {.shard_bytes = 100}));
    Must(Save("b", Step(weights_, 1), {.kind = SnapshotKind::kDelta}));
    good_ = files_->Latest();
    ASSERT_TRUE(good_.files.contains("/s/a/" + Shard(3)));
  }

  // Why neither can be read; "" if both can, "?" if only one.
  std::string ReasonWith(const std::function<void(DiskImage&)>& change) {
    DiskImage bad = good_;
    change(bad);
    Replace(bad);
    const std::string base = ReadReason("a"), delta = ReadReason("b");
    if (base.empty() && delta.empty()) return "";
    const bool same = delta == base || delta == "DELTA_PARENT_UNAVAILABLE" ||
                      delta == "DELTA_PARENT_MISMATCH";
    return !base.empty() && same ? base : "?";
  }

  // Seals the manifest, with the digests of the files that are there.
  static void Reseal(DiskImage& image, Json json) {
    for (Json& file : json["files"]) {
      const auto found =
          image.files.find("/s/a/" + file["name"].get<std::string>());
      if (found == image.files.end()) continue;
      file["bytes"] = found->second.size();
      file["digest"] = DigestOf(found->second);
    }
    json.erase("digest");
    image.files[kManifest] = SealJson(json);
  }
  static Json ManifestOf(const DiskImage& image) {
    return Json::parse(image.files.at(kManifest));
  }
  // With another index, whose digest is right.
  std::string ReasonWithIndex(const std::string& text) {
    return ReasonWith([&](DiskImage& image) {
      image.files[kIndex] = text;
      Reseal(image, ManifestOf(image));
    });
  }

  const TestWeights weights_ = MakeLayers();
  DiskImage good_;
};

TEST_F(ShardDamageTest, AnyFlippedBitOrCutIsFound) {
  int64_t flips = 0;
  for (const auto& [path, content] : good_.files) {
    if (!path.starts_with("/s/a/")) continue;
    for (size_t at = 0; at < content.size(); ++at) {
      ASSERT_EQ(ReasonWith([&, &p = path](DiskImage& image) {
                  image.files[p][at] ^= static_cast<char>(1 << (at % 8));
                }),
                "CHECKPOINT_CORRUPT")
          << path << " " << at;
      ++flips;
    }
    for (size_t size = 0; size < content.size(); ++size) {
      ASSERT_EQ(ReasonWith([&, &p = path](DiskImage& image) {
                  image.files[p].resize(size);
                }),
                "CHECKPOINT_CORRUPT")
          << path << " " << size;
    }
    ASSERT_EQ(
        ReasonWith([&, &p = path](DiskImage& image) { image.files[p] += ' '; }),
        "CHECKPOINT_CORRUPT")
        << path;
  }
  EXPECT_GT(flips, 2000);
}

TEST_F(ShardDamageTest, MissingAndSwappedFilesAreFound) {
  int64_t swaps = 0;
  for (const auto& [path, content] : good_.files) {
    if (!path.starts_with("/s/a/")) continue;
    EXPECT_EQ(
        ReasonWith([&, &p = path](DiskImage& image) { image.files.erase(p); }),
        "CHECKPOINT_CORRUPT")
        << path;
    for (const auto& [other, another] : good_.files) {
      if (!other.starts_with("/s/a/") || other == path) continue;
      EXPECT_EQ(ReasonWith([&, &p = path, &o = other](DiskImage& image) {
                  std::swap(image.files[p], image.files[o]);
                }),
                "CHECKPOINT_CORRUPT")
          << path << " " << other;
      ++swaps;
    }
  }
  EXPECT_EQ(swaps, 30);
}

// Others would read it in place of what the manifest names.
TEST_F(ShardDamageTest, FilesOfWeightsThatNobodyNamesAreFound) {
  for (const char* name :
       {"model.safetensors", "model-00004-of-00003.safetensors",
        "model-00001-of-00002.safetensors", "adapter_model.safetensors",
        "delta.safetensors", "other.safetensors.index.json"}) {
    for (const std::string& content : {std::string(), weights_.File()}) {
      EXPECT_EQ(ReasonWith([&](DiskImage& image) {
                  image.files[std::string("/s/a/") + name] = content;
                }),
                "CHECKPOINT_CORRUPT")
          << name;
    }
  }
  EXPECT_EQ(ReasonWith([&](DiskImage& image) {
              image.files["/s/b/model.safetensors"] = weights_.File();
            }),
            "?");  // of the delta alone
  EXPECT_EQ(ReadReason("b"), "CHECKPOINT_CORRUPT");
  // What is no weights is nobody's business.
  EXPECT_EQ(ReasonWith(
                [&](DiskImage& image) { image.files["/s/a/README.md"] = "?"; }),
            "");
}

TEST_F(ShardDamageTest, ManifestsOfOtherShardsAreRefused) {
  const auto reason = [&](const std::function<void(Json&)>& change) {
    return ReasonWith([&](DiskImage& image) {
      Json json = ManifestOf(image);
      change(json);
      Reseal(image, json);
    });
  };
  EXPECT_EQ(reason([](Json&) {}), "");
  // Shard 1, 2, 3, the index and config.json.
  ASSERT_EQ(ManifestOf(good_)["files"].size(), 5u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(reason([&](Json& json) { json["files"].erase(i); }),
              "CHECKPOINT_CORRUPT")
        << i;
    for (const char* name :
         {"model.safetensors", "model-00004-of-00003.safetensors",
          "model-00000-of-00003.safetensors", "model-1-of-3.safetensors",
          "model-00001-of-00004.safetensors", "delta.safetensors",
          "model.safetensors.index.json.safetensors"}) {
      EXPECT_EQ(reason([&](Json& json) {
                  Json extra = json["files"][i];
                  extra["name"] = name;
                  json["files"].push_back(extra);
                }),
                "CHECKPOINT_CORRUPT")
          << i << name;
      EXPECT_EQ(reason([&](Json& json) { json["files"][i]["name"] = name; }),
                "CHECKPOINT_CORRUPT")
          << i << name;
    }
  }
  EXPECT_EQ(
      reason([](Json& json) { std::swap(json["files"][0], json["files"][1]); }),
      "CHECKPOINT_CORRUPT");
  EXPECT_EQ(reason([](Json& json) { json["version"] = 1; }),
            "CHECKPOINT_CORRUPT");
  EXPECT_EQ(reason([](Json& json) { json["version"] = 3; }), "STATE_VERSION");
  // Of a version that knows no shards.
  EXPECT_EQ(reason([](Json& json) {
              json["version"] = 1;
              json["files"].erase(3);
            }),
            "CHECKPOINT_CORRUPT");
}

// Two shards under each other's names, with digests that are right: the weights
// are the same, and the index is not theirs.
TEST_F(ShardDamageTest, ShardsUnderOtherNamesAreFound) {
  for (const auto& [one, other] :
       {std::pair(1, 2), std::pair(2, 3), std::pair(1, 3)}) {
    EXPECT_EQ(ReasonWith([&, a = one, b = other](DiskImage& image) {
                std::swap(image.files["/s/a/" + Shard(a)],
                          image.files["/s/a/" + Shard(b)]);
                Reseal(image, ManifestOf(image));
              }),
              "CHECKPOINT_CORRUPT");
    EXPECT_EQ(ReasonWith([&, a = one, b = other](DiskImage& image) {
                image.files["/s/a/" + Shard(a)] =
                    image.files["/s/a/" + Shard(b)];
                Reseal(image, ManifestOf(image));
              }),
              "CHECKPOINT_CORRUPT");
  }
}

TEST_F(ShardDamageTest, AnIndexThatIsNotOfTheShardsIsFound) {
  const Json good = Json::parse(good_.files.at(kIndex));
  EXPECT_EQ(ReasonWithIndex(good.dump()), "");
  const auto reason = [&](const Json& patch) {
    Json json = good;
    json.merge_patch(patch);
    return ReasonWithIndex(json.dump());
  };
  const auto map = [](const std::string& tensor, const Json& file) {
    return Json{{"weight_map", {{tensor, file}}}};
  };
  for (const Json& patch :
       std::vector<Json>{map("embed", Shard(2)),
                         map("embed", Shard(4)),
                         map("embed", "model.safetensors"),
                         map("embed", "../a/" + Shard(1)),
                         map("embed", "/s/a/" + Shard(1)),
                         map("embed", ".hidden"),
                         map("embed", ""),
                         map("embed", 1),
                         map("embed", Json::array()),
                         map("embed", nullptr),
                         map("one more", Shard(1)),
                         {{"weight_map", nullptr}},
                         {{"weight_map", Json::array()}},
                         {{"weight_map", 3}},
                         {{"metadata", nullptr}},
                         {{"metadata", {{"total_size", nullptr}}}},
                         {{"metadata", {{"total_size", 303}}}},
                         {{"metadata", {{"total_size", -304}}}},
                         {{"metadata", {{"total_size", 304.0}}}},
                         {{"metadata", {{"total_size", "304"}}}},
                         {{"metadata", {{"total_size", UINT64_MAX}}}}}) {
    EXPECT_EQ(reason(patch), "CHECKPOINT_CORRUPT") << patch;
  }
  const std::string text = good.dump();
  for (const std::string& bad :
       {std::string(), std::string("{"), std::string("[]"), std::string("null"),
        std::string(100'000, '['), text + "{}", text + std::string(1, '\0'),
        "\xef\xbb\xbf" + text,
        text.substr(0, text.size() - 1) + ",\"weight_map\":{}}"}) {
    EXPECT_EQ(ReasonWithIndex(bad), "CHECKPOINT_CORRUPT") << bad.substr(0, 50);
  }
}

// The same tensor in two shards, to each of which an index could point.
TEST_F(ShardDamageTest, ATensorInTwoShardsIsFound) {
  TestWeights twice;
  twice.infos = {weights_.infos[3], weights_.infos[0]};
  twice.values = {weights_.values[3], weights_.values[0]};
  EXPECT_EQ(ReasonWith([&](DiskImage& image) {
              image.files["/s/a/" + Shard(3)] = twice.File();
              Reseal(image, ManifestOf(image));
            }),
            "CHECKPOINT_CORRUPT");
}

// Nothing is read, nor memory taken, for an index of any declared size.
TEST_F(ShardDamageTest, SizesThatAreOnlyDeclaredAreRefused) {
  for (const char* name :
       {"model.safetensors.index.json", "model-00001-of-00003.safetensors"}) {
    for (const int64_t bytes : {int64_t{100'000'001}, int64_t{1} << 60}) {
      EXPECT_EQ(ReasonWith([&](DiskImage& image) {
                  Json json = ManifestOf(image);
                  for (Json& file : json["files"]) {
                    if (file["name"] == name) file["bytes"] = bytes;
                  }
                  json.erase("digest");
                  image.files[kManifest] = SealJson(json);
                }),
                "CHECKPOINT_CORRUPT")
          << name;
    }
  }
}

}  // namespace
}  // namespace gradwire
