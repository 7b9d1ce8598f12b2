// SPDX-License-Identifier: Apache-2.0
// Damaged and hostile checkpoints: found before anybody gets other elements.
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/state_format.h"
#include "checkpoint/state_testing.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

using Json = nlohmann::json;

constexpr char kDirectory[] = "/a";
constexpr char kCorrupt[] = "CHECKPOINT_CORRUPT";

struct Saved {
  explicit Saved(int64_t num_parameters = 23) {
    state = MakeState(num_parameters, 3, DType::kBF16);
    CrashFileSystem files;
    EXPECT_TRUE(
        Save(files, kDirectory, state, DealPieces(state, 2, 2), 32).ok());
    image = files.Latest();
  }
  TestState state;
  DiskImage image;
};

// The reason for which the checkpoint on a disk is refused; "" if it is read as
// it was saved, and what is wrong if it is read differently.
std::string Outcome(const DiskImage& image, const TestState& state) {
  CrashFileSystem files(image);
  absl::Status status;
  const std::string wrong = Compare(files, kDirectory, state, &status);
  return status.ok() ? wrong : ReasonOf(status);
}

TEST(StateDamageTest, EveryFlippedBitIsFound) {
  Saved saved;
  ASSERT_EQ(Outcome(saved.image, saved.state), "");
  int64_t flips = 0;
  for (auto& [path, content] : saved.image.files) {
    for (char& byte : content) {
      for (int bit = 0; bit < 8; ++bit) {
        byte ^= static_cast<char>(1 << bit);
        ASSERT_EQ(Outcome(saved.image, saved.state), kCorrupt)
            << path << " at " << &byte - content.data() << ", bit " << bit;
        byte ^= static_cast<char>(1 << bit);
        ++flips;
      }
    }
  }
  EXPECT_GT(flips, 10'000);
  RecordProperty("flips", std::to_string(flips));
}

// JSON does not care which white space it is; the digest does.
TEST(StateDamageTest, EveryOtherSpaceIsFound) {
  Saved saved;
  for (auto& [path, content] : saved.image.files) {
    for (char& byte : content) {
      const char before = byte;
      for (const char space : {' ', '\n', '\t', '\r'}) {
        if (space == before) continue;
        byte = space;
        ASSERT_EQ(Outcome(saved.image, saved.state), kCorrupt)
            << path << " at " << &byte - content.data();
        byte = before;
      }
    }
  }
}

TEST(StateDamageTest, EveryOtherLengthIsFound) {
  Saved saved;
  for (auto& [path, content] : saved.image.files) {
    const std::string whole = content;
    for (size_t length = 0; length < whole.size(); ++length) {
      content = whole.substr(0, length);
      ASSERT_EQ(Outcome(saved.image, saved.state), kCorrupt)
          << path << " of " << length << " bytes";
    }
    for (const std::string& more : {std::string(1, '\0'), std::string("\n"),
                                    whole, std::string(100, ' ')}) {
      content = whole + more;
      ASSERT_EQ(Outcome(saved.image, saved.state), kCorrupt) << path;
    }
    content = whole;
  }
}

TEST(StateDamageTest, EveryMissingFileIsFound) {
  Saved saved;
  const DiskImage whole = saved.image;
  for (const auto& [path, content] : whole.files) {
    saved.image.files.erase(path);
    EXPECT_EQ(Outcome(saved.image, saved.state), kCorrupt) << path;
    saved.image = whole;
  }
}

// Files of two checkpoints of one layout.
TEST(StateDamageTest, FilesOfAnotherCheckpointAreFound) {
  Saved saved;
  TestState other = MakeState(23, 4, DType::kBF16);
  CrashFileSystem files;
  ASSERT_TRUE(
      Save(files, kDirectory, other, DealPieces(saved.state, 2, 2), 32).ok());
  const DiskImage whole = saved.image;
  for (const auto& [path, content] : files.Latest().files) {
    saved.image.files.at(path) = content;
    EXPECT_EQ(Outcome(saved.image, saved.state), kCorrupt) << path;
    saved.image = whole;
  }
}

TEST(StateDamageTest, TheErrorNamesThePlace) {
  Saved saved;
  saved.image.files.at("/a/rank-00001.data")[40] ^= 1;
  CrashFileSystem files(saved.image);
  absl::Status status;
  Compare(files, kDirectory, saved.state, &status);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  const ErrorDetail detail = GetErrorDetail(status).value();
  EXPECT_EQ(detail.category, ErrorCategory::kServer);
  EXPECT_EQ(detail.metadata.at("checkpoint"), "a");
  EXPECT_EQ(detail.metadata.at("file"), "rank-00001.data");
  EXPECT_EQ(detail.metadata.at("chunk"), "1");
}

// Of a reader that has verified nothing there yet; the others are right.
TEST(StateDamageTest, IsFoundWhereItIs) {
  Saved saved;
  saved.image.files.at("/a/rank-00000.data")[0] ^= 1;
  CrashFileSystem files(saved.image);
  auto reader = *StateReader::Open(files, kDirectory);
  int64_t right = 0, refused = 0;
  for (const auto& [vector, dtype] : saved.state.dtypes) {
    for (int64_t begin = 0; begin < 23; ++begin) {
      const std::string_view expected =
          PieceOf(saved.state, {vector, dtype, begin, 1});
      std::string read(expected.size(), '\0');
      const absl::Status status = reader->Read(vector, begin, 1, read.data());
      EXPECT_EQ(reader->Verify(vector, begin, 1).ok(), status.ok());
      ++(status.ok() ? right : refused);
      if (status.ok()) {
        EXPECT_EQ(read, expected);
      }
    }
  }
  // The 32 bytes of one chunk.
  EXPECT_GE(refused, 8);
  EXPECT_LE(refused, 16);
  EXPECT_EQ(right, 3 * 23 - refused);
}

// Somebody who writes whole files, digests and all.
class HostileStateTest : public testing::Test {
 protected:
  HostileStateTest() {
    for (const auto& [path, content] : saved_.image.files) {
      if (path.ends_with(".json")) json_[path] = Json::parse(content);
    }
  }

  static std::string Sealed(Json json) {
    json.erase("digest");
    return SealedText(json.dump(1));
  }
  static std::string SealedText(std::string object) {
    object.resize(object.size() - 2);
    return object + ",\n \"digest\": \"" + DigestOf(object) + "\"\n}\n";
  }

  // The outcome with a table and a manifest that fits it.
  std::string WithTable(const std::string& text) {
    DiskImage image = saved_.image;
    image.files["/a/rank-00001.json"] = text;
    Json manifest = json_["/a/manifest.json"];
    manifest["ranks"][1]["table_bytes"] = text.size();
    manifest["ranks"][1]["table_digest"] = DigestOf(text);
    image.files["/a/manifest.json"] = Sealed(manifest);
    return Outcome(image, saved_.state);
  }
  std::string WithManifest(const std::string& text) {
    DiskImage image = saved_.image;
    image.files["/a/manifest.json"] = text;
    return Outcome(image, saved_.state);
  }
  std::string ChangeTable(const std::function<void(Json&)>& change) {
    Json table = json_["/a/rank-00001.json"];
    change(table);
    return WithTable(Sealed(table));
  }
  std::string ChangeManifest(const std::function<void(Json&)>& change) {
    Json manifest = json_["/a/manifest.json"];
    change(manifest);
    return WithManifest(Sealed(manifest));
  }

  Saved saved_;
  std::map<std::string, Json> json_;
};

// Values that no number in these files may have.
std::vector<Json> WrongNumbers() {
  return {-1,  INT64_MIN, UINT64_MAX, INT64_MAX,     1e300,     0.5,
          "1", nullptr,   true,       Json::array(), {{"a", 1}}};
}

TEST_F(HostileStateTest, IsSealedAsTheWriterDoes) {
  EXPECT_EQ(ChangeTable([](Json&) {}), "");
  EXPECT_EQ(ChangeManifest([](Json&) {}), "");
}

TEST_F(HostileStateTest, NumbersAreBounded) {
  for (const Json& wrong : WrongNumbers()) {
    for (const char* field :
         {"rank", "data_bytes", "chunk_digests", "pieces", "data"}) {
      EXPECT_EQ(ChangeTable([&](Json& table) { table[field] = wrong; }),
                kCorrupt)
          << field << " " << wrong;
    }
    // A chunk of any length may cover a short file, but not with its digests.
    EXPECT_EQ(ChangeTable([&](Json& table) { table["chunk_bytes"] = wrong; }),
              kCorrupt);
    for (const char* field : {"begin", "count", "vector", "dtype"}) {
      for (size_t piece = 0; piece < 2; ++piece) {
        EXPECT_EQ(ChangeTable([&](Json& table) {
                    table["pieces"][piece][field] = wrong;
                  }),
                  kCorrupt)
            << field << " " << wrong;
      }
    }
    EXPECT_EQ(ChangeTable([&](Json& table) { table["pieces"][0] = wrong; }),
              kCorrupt);
    EXPECT_EQ(
        ChangeTable([&](Json& table) { table["chunk_digests"][0] = wrong; }),
        kCorrupt);
    for (const char* field : {"num_parameters", "ranks", "format", "version"}) {
      const std::string reason =
          ChangeManifest([&](Json& manifest) { manifest[field] = wrong; });
      const bool is_version =
          std::string(field) == "version" && wrong == Json(INT64_MAX);
      EXPECT_EQ(reason, is_version ? "STATE_VERSION" : kCorrupt)
          << field << " " << wrong;
    }
    for (const char* field : {"table", "table_bytes", "table_digest"}) {
      EXPECT_EQ(ChangeManifest([&](Json& manifest) {
                  manifest["ranks"][0][field] = wrong;
                }),
                kCorrupt)
          << field << " " << wrong;
    }
  }
  for (const Json& wrong : {Json(-1), Json(0.5), Json(UINT64_MAX), Json("1")}) {
    for (const char* field : {"optimizer_step", "weight_version"}) {
      EXPECT_EQ(
          ChangeManifest([&](Json& manifest) { manifest[field] = wrong; }),
          kCorrupt);
    }
  }
  EXPECT_EQ(ChangeTable([](Json& table) { table["chunk_bytes"] = 0; }),
            kCorrupt);
}

TEST_F(HostileStateTest, PiecesThatOverflowAreRefused) {
  // 4 * 2^48 bytes each: their sum would pass 2^63 and come back.
  EXPECT_EQ(ChangeTable([](Json& table) {
              Json piece = {{"vector", "weight"},
                            {"dtype", "f32"},
                            {"begin", 0},
                            {"count", int64_t{1} << 48}};
              for (int i = 0; i < (1 << 14); ++i) {
                table["pieces"].push_back(piece);
              }
            }),
            kCorrupt);
  EXPECT_EQ(ChangeTable([](Json& table) {
              table["pieces"].push_back(table["pieces"][0]);
            }),
            kCorrupt);
  // Two that cover the same, and as many bytes as before.
  EXPECT_EQ(ChangeTable([](Json& table) {
              Json& piece = table["pieces"][0];
              piece["begin"] = piece["begin"] == 0 ? 1 : 0;
            }),
            kCorrupt);
}

TEST_F(HostileStateTest, NoOtherFileIsOpened) {
  for (const char* name : {"../x", "/etc/passwd", "", ".", "..", "a/b",
                           "rank-00000.json/../rank-00000.json",
                           "rank-00001.json", "rank-0.json"}) {
    EXPECT_EQ(ChangeManifest([&](Json& manifest) {
                manifest["ranks"][0]["table"] = name;
              }),
              kCorrupt);
    EXPECT_EQ(ChangeTable([&](Json& table) { table["data"] = name; }),
              kCorrupt);
  }
}

TEST_F(HostileStateTest, RanksAreThoseThatThereAre) {
  EXPECT_EQ(ChangeManifest([](Json& manifest) { manifest["ranks"].erase(1); }),
            kCorrupt);
  EXPECT_EQ(ChangeManifest([](Json& manifest) {
              manifest["ranks"].push_back(manifest["ranks"][1]);
            }),
            kCorrupt);
  EXPECT_EQ(ChangeManifest([](Json& manifest) {
              std::swap(manifest["ranks"][0], manifest["ranks"][1]);
            }),
            kCorrupt);
  EXPECT_EQ(
      ChangeManifest([](Json& manifest) { manifest["ranks"] = Json::array(); }),
      kCorrupt);
}

TEST_F(HostileStateTest, MembersAreKnownAndThere) {
  for (const char* path : {"/a/manifest.json", "/a/rank-00001.json"}) {
    const bool is_manifest = std::string(path) == "/a/manifest.json";
    const auto outcome = [&](const Json& json) {
      return is_manifest ? WithManifest(Sealed(json)) : WithTable(Sealed(json));
    };
    for (const auto& [name, value] : json_[path].items()) {
      if (name == "digest") continue;
      Json json = json_[path];
      json.erase(name);
      EXPECT_EQ(outcome(json), kCorrupt) << name;
    }
    Json json = json_[path];
    json["more"] = 1;
    EXPECT_EQ(outcome(json), kCorrupt);
  }
  EXPECT_EQ(ChangeManifest([](Json& manifest) {
              manifest["attributes"]["a"] = Json::array();
            }),
            kCorrupt);
}

TEST_F(HostileStateTest, TextsAreStrict) {
  const std::string table = saved_.image.files.at("/a/rank-00001.json");
  const std::string manifest = saved_.image.files.at("/a/manifest.json");
  // Without the seal, with something put first.
  const auto with = [](std::string text, const std::string& first) {
    text.resize(text.size() - 50);
    return SealedText("{" + first + text.substr(1) + "\n}");
  };
  EXPECT_EQ(WithTable(with(table, " ")), "");
  EXPECT_EQ(WithManifest(with(manifest, " ")), "");
  std::string deep = "\"a\": ";
  for (int i = 0; i < 100'000; ++i) deep += '[';
  for (int i = 0; i < 100'000; ++i) deep += ']';
  for (const std::string& first :
       {deep + ",", std::string("\"rank\": 1,"), std::string("\"version\": 1,"),
        std::string("\"digest\": \"\","), std::string("\"\xff\": 1,"),
        std::string("\"a\": 1e999,"), std::string("x"), std::string("\0", 1),
        std::string(",")}) {
    EXPECT_EQ(WithTable(with(table, first)), kCorrupt);
    EXPECT_EQ(WithManifest(with(manifest, first)), kCorrupt);
  }
  for (const char* text : {"[]\n}", "\n}", "{\n}", "nul"}) {
    EXPECT_EQ(WithTable(SealedText(text)), kCorrupt);
    EXPECT_EQ(WithManifest(SealedText(text)), kCorrupt);
  }
}

TEST_F(HostileStateTest, AnotherVersionIsNoDamage) {
  EXPECT_EQ(ChangeManifest([](Json& manifest) {
              manifest["version"] = 2;
              manifest["more"] = Json::array({1, 2});
              manifest.erase("num_parameters");
            }),
            "STATE_VERSION");
}

// A file whose size is only declared: nothing of it is allocated.
TEST_F(HostileStateTest, FilesThatAreTooLongAreNotRead) {
  DiskImage image = saved_.image;
  image.files["/a/manifest.json"].resize(kMaxManifestBytes + 1);
  EXPECT_EQ(Outcome(image, saved_.state), kCorrupt);
}

}  // namespace
}  // namespace gradwire
