// SPDX-License-Identifier: Apache-2.0
// Files that are damaged, and files that were made to do damage.
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "checkpoint/delta/apply.h"
#include "checkpoint/delta/delta_testing.h"
#include "checkpoint/delta/encode.h"
#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

using Json = nlohmann::ordered_json;

// A small file with all methods.
struct Sample {
  Sample() {
    std::mt19937 random(1);
    FloatBytes floats{random};
    const std::vector<std::pair<std::string, double>> tensors = {
        {"gaps", 0.03}, {"bitmap", 0.3}, {"dense", 0.9}, {"kept", 0}};
    for (const auto& [name, density] : tensors) {
      before.Add({name, "BF16", {20, 20}}, floats);
    }
    before.Add({"raw", "F32", {9}}, floats);
    after = before;
    for (size_t i = 0; i < tensors.size(); ++i) {
      ChangeSome(after.data<uint16_t>(i), 400, tensors[i].second, random, 0.02);
    }
    after.data(4)[0] ^= 1;
    file = *EncodeDelta(before.views(), after.views(), OptionsFor(before));
  }
  TestWeights before, after;
  std::string file;
};

// Reading and applying `file` either fails and leaves the weights, or gives the
// right ones. Returns whether it failed.
bool FailsOrIsRight(const Sample& sample, const std::string& file) {
  const auto delta = DeltaFile::Parse(file);
  if (!delta.ok()) {
    const absl::StatusCode code = delta.status().code();
    EXPECT_TRUE(code == absl::StatusCode::kInvalidArgument ||
                code == absl::StatusCode::kDataLoss)
        << delta.status();
    EXPECT_TRUE(GetErrorDetail(delta.status()).has_value());
    return true;
  }
  TestWeights weights = sample.before;
  std::string id = sample.before.id();
  const absl::Status status = ApplyDelta(*delta, weights.tensors(), id);
  EXPECT_TRUE(weights == (status.ok() ? sample.after : sample.before));
  if (!status.ok()) return true;
  EXPECT_EQ(id, sample.after.id());
  EXPECT_EQ(delta->info().step, 7);
  EXPECT_EQ(delta->info().model, "test");
  EXPECT_EQ(delta->info().chain_length, 1);
  return false;
}

TEST(DeltaHostileTest, NoFlippedBitPassesForAnotherDelta) {
  const Sample sample;
  ASSERT_FALSE(FailsOrIsRight(sample, sample.file));
  int harmless = 0;
  for (size_t at = 0; at < sample.file.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string file = sample.file;
      file[at] = static_cast<char>(file[at] ^ 1 << bit);
      harmless += !FailsOrIsRight(sample, file);
    }
  }
  // White space behind the header may become another.
  EXPECT_LT(harmless, 24);
}

TEST(DeltaHostileTest, NoByteCanBeReplaced) {
  const Sample sample;
  std::mt19937 random(2);
  for (int round = 0; round < 3000; ++round) {
    std::string file = sample.file;
    const size_t at = random() % file.size();
    const size_t count = 1 + random() % 8;
    for (size_t i = at; i < std::min(file.size(), at + count); ++i) {
      file[i] = static_cast<char>(random());
    }
    FailsOrIsRight(sample, file);
  }
}

TEST(DeltaHostileTest, NoTruncationOrExtensionIsAccepted) {
  const Sample sample;
  for (size_t size = 0; size < sample.file.size(); ++size) {
    EXPECT_TRUE(FailsOrIsRight(sample, sample.file.substr(0, size))) << size;
  }
  EXPECT_TRUE(FailsOrIsRight(sample, sample.file + '\0'));
  EXPECT_TRUE(FailsOrIsRight(sample, sample.file + sample.file));
}

// The parts of a file that an attacker, who can make digests, changes.
struct Parts {
  explicit Parts(const std::string& file) {
    const auto parsed = ParseSafetensors(file, 1 << 20);
    delta = Json::parse(parsed->metadata.at("delta"));
    for (const auto& [name, entry] : parsed->entries) {
      streams[name] = file.substr(static_cast<size_t>(entry.offset),
                                  static_cast<size_t>(entry.bytes));
    }
  }
  Json& tensor(const std::string& name) {
    for (Json& tensor : delta["tensors"]) {
      if (tensor["name"] == name) return tensor;
    }
    return delta;
  }
  // With all digests and ids right.
  std::string File() {
    auto hex = [](uint64_t digest) {
      char text[17];
      std::snprintf(text, sizeof(text), "%016llx",
                    static_cast<unsigned long long>(digest));
      return std::string(text);
    };
    if (delta.is_object() && delta["tensors"].is_array()) {
      for (Json& tensor : delta["tensors"]) {
        if (!tensor.is_object() || !tensor.contains("groups")) continue;
        const std::string name = tensor["name"];
        const std::string& table = streams["table/" + name];
        const std::string& payload = streams["payload/" + name];
        tensor["table_digest"] =
            hex(HashBytes64(table.data(), static_cast<int64_t>(table.size())));
        if (tensor["groups"].size() == 1) {
          tensor["groups"][0]["digest"] = hex(HashBytes64(
              payload.data(), static_cast<int64_t>(payload.size())));
        }
      }
    }
    const std::string json = text.empty() ? delta.dump() : text;
    Json header;
    header["__metadata__"] = {
        {"format", "dlt1"},
        {"delta", json},
        {"digest",
         HashBytes128(json.data(), static_cast<int64_t>(json.size())).Hex()}};
    std::string data;
    for (const auto& [name, stream] : streams) {
      header[name] = {
          {"dtype", "U8"},
          {"shape", {stream.size()}},
          {"data_offsets", {data.size(), data.size() + stream.size()}}};
      data += stream;
    }
    const std::string header_text = header.dump();
    std::string out;
    for (int i = 0; i < 8; ++i) {
      out.push_back(static_cast<char>(header_text.size() >> (8 * i)));
    }
    return out + header_text + data;
  }
  Json delta;
  std::string text;  // in place of `delta`, if not empty
  std::map<std::string, std::string> streams;
};

TEST(DeltaHostileTest, SealedPartsAreTheFile) {
  const Sample sample;
  EXPECT_FALSE(FailsOrIsRight(sample, Parts(sample.file).File()));
}

TEST(DeltaHostileTest, LiesWithRightDigestsAreRefused) {
  const Sample sample;
  const std::vector<std::pair<const char*, std::function<void(Parts&)>>> lies =
      {
          {"format", [](Parts& p) { p.delta["format"] = "dlt2"; }},
          {"not an object", [](Parts& p) { p.delta = Json::array(); }},
          {"no step", [](Parts& p) { p.delta.erase("step"); }},
          {"negative step", [](Parts& p) { p.delta["step"] = -1; }},
          {"broken step", [](Parts& p) { p.delta["step"] = 1.5; }},
          {"huge step", [](Parts& p) { p.delta["step"] = 1e300; }},
          {"not in a chain", [](Parts& p) { p.delta["chain_length"] = 0; }},
          {"unknown member", [](Parts& p) { p.delta["x"] = 1; }},
          {"short id", [](Parts& p) { p.delta["id"] = "12"; }},
          {"another id",
           [](Parts& p) { p.delta["id"] = std::string(32, '0'); }},
          {"no tensors", [](Parts& p) { p.delta["tensors"] = 3; }},
          {"a tensor that is none",
           [](Parts& p) { p.delta["tensors"][0] = "gaps"; }},
          {"a tensor fewer", [](Parts& p) { p.delta["tensors"].erase(0); }},
          {"a tensor twice",
           [](Parts& p) {
             p.delta["tensors"].insert(p.delta["tensors"].begin(),
                                       p.delta["tensors"][0]);
           }},
          {"name", [](Parts& p) { p.tensor("gaps")["name"] = "gapt"; }},
          {"dtype", [](Parts& p) { p.tensor("gaps")["dtype"] = "F16"; }},
          {"unknown dtype", [](Parts& p) { p.tensor("gaps")["dtype"] = "X"; }},
          {"shape", [](Parts& p) { p.tensor("gaps")["shape"] = {400}; }},
          {"huge shape",
           [](Parts& p) {
             p.tensor("gaps")["shape"] = {1ll << 36, 1ll << 36, 1ll << 36};
           }},
          {"large shape",
           [](Parts& p) { p.tensor("gaps")["shape"] = {1ll << 36}; }},
          {"shape with groups to match",
           [](Parts& p) {
             p.tensor("kept")["shape"] = {1ll << 36};
             p.tensor("kept").erase("groups");
           }},
          {"negative shape",
           [](Parts& p) {
             p.tensor("gaps")["shape"] = {-20, -20};
           }},
          {"nine dimensions",
           [](Parts& p) {
             p.tensor("gaps")["shape"] = {400, 1, 1, 1, 1, 1, 1, 1, 1};
           }},
          {"hash",
           [](Parts& p) { p.tensor("gaps")["hash"] = std::string(32, '1'); }},
          {"fresh", [](Parts& p) { p.tensor("gaps")["fresh"] = 1; }},
          {"fresh without values",
           [](Parts& p) { p.tensor("kept")["fresh"] = 1; }},
          {"no groups",
           [](Parts& p) { p.tensor("gaps")["groups"] = Json::array(); }},
          {"too many chunks",
           [](Parts& p) { p.tensor("gaps")["groups"][0]["chunks"] = 2; }},
          {"no chunks",
           [](Parts& p) { p.tensor("gaps")["groups"][0]["chunks"] = 0; }},
          {"negative sizes",
           [](Parts& p) { p.tensor("gaps")["groups"][0]["sizes"][0] = -1; }},
          {"sizes that overflow",
           [](Parts& p) {
             for (Json& s : p.tensor("gaps")["groups"][0]["sizes"]) {
               s = 1ll << 53;
             }
           }},
          {"sizes of another stream",
           [](Parts& p) {
             Json& sizes = p.tensor("gaps")["groups"][0]["sizes"];
             std::swap(sizes[0], sizes[1]);
           }},
          {"a size fewer",
           [](Parts& p) { p.tensor("gaps")["groups"][0]["sizes"].erase(0); }},
          {"a table cut", [](Parts& p) { p.streams["table/gaps"].pop_back(); }},
          {"no table", [](Parts& p) { p.streams["table/gaps"].clear(); }},
          {"a long table",
           [](Parts& p) { p.streams["table/gaps"] += "xxxxxxxxxxxxxxx"; }},
          {"a payload cut",
           [](Parts& p) { p.streams["payload/gaps"].pop_back(); }},
          {"a payload with more",
           [](Parts& p) { p.streams["payload/gaps"] += 'x'; }},
          {"a stream of no tensor", [](Parts& p) { p.streams["x"] = "x"; }},
          {"no payload", [](Parts& p) { p.streams.erase("payload/gaps"); }},
          {"method", [](Parts& p) { p.streams["table/gaps"][0] = '\2'; }},
          {"method of raw", [](Parts& p) { p.streams["table/raw"][0] = '\1'; }},
          {"flags", [](Parts& p) { p.streams["table/gaps"][1] = '\4'; }},
          {"one change more", [](Parts& p) { ++p.streams["table/gaps"][2]; }},
          {"one change less", [](Parts& p) { --p.streams["table/gaps"][2]; }},
          {"an escape more", [](Parts& p) { ++p.streams["table/gaps"][6]; }},
          {"crc", [](Parts& p) { p.streams["table/gaps"][8] ^= 1; }},
      };
  for (const auto& [what, lie] : lies) {
    Parts parts(sample.file);
    lie(parts);
    EXPECT_TRUE(FailsOrIsRight(sample, parts.File())) << what;
  }
}

// Texts that readers of JSON take for different things, with a digest that is
// right.
TEST(DeltaHostileTest, TextsWithTwoMeaningsAreRefused) {
  const Sample sample;
  Parts parts(sample.file);
  const std::string good = parts.delta.dump();
  for (const std::string& text :
       {good.substr(0, good.size() - 1) + ",\"step\":8}",
        good + std::string("\0x", 2), "\xEF\xBB\xBF" + good}) {
    Parts other = parts;
    other.text = text;
    EXPECT_TRUE(FailsOrIsRight(sample, other.File()));
  }
  parts.text = good;
  EXPECT_FALSE(FailsOrIsRight(sample, parts.File()));
}

// Any byte of any stream, with the digests made to match.
TEST(DeltaHostileTest, StreamsWithRightDigestsAreFoundByTheChecksum) {
  const Sample sample;
  const Parts parts(sample.file);
  std::mt19937 random(3);
  for (const auto& [name, stream] : parts.streams) {
    for (size_t at = 0; at < stream.size(); ++at) {
      Parts changed = parts;
      changed.streams[name][at] =
          static_cast<char>(changed.streams[name][at] ^ 1 << random() % 8);
      // Harmless where a frame has bits that say nothing.
      FailsOrIsRight(sample, changed.File());
    }
  }
}

TEST(DeltaHostileTest, RandomFilesAreRefused) {
  const Sample sample;
  std::mt19937 random(4);
  for (int round = 0; round < 2000; ++round) {
    std::string file(random() % 200, '\0');
    for (char& c : file) c = static_cast<char>(random());
    if (file.size() >= 8 && round % 2) {
      file.replace(0, 8, std::string("\x10\0\0\0\0\0\0\0", 8));
    }
    EXPECT_TRUE(FailsOrIsRight(sample, file));
  }
}

TEST(DeltaHostileTest, DeepNestingIsRefused) {
  const Sample sample;
  Parts parts(sample.file);
  Json deep = 1;
  for (int i = 0; i < 2000; ++i) deep = Json::array({deep});
  parts.delta["model"] = deep;
  EXPECT_TRUE(FailsOrIsRight(sample, parts.File()));
}

}  // namespace
}  // namespace gradwire
