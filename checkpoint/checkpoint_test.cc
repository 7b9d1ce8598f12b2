// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/publish.h"
#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

std::string Path(const std::string& name) {
  const std::string directory =
      testing::TempDir() + "/" +
      testing::UnitTest::GetInstance()->current_test_info()->name();
  std::filesystem::create_directories(directory);
  return directory + "/" + name;
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// A file with this header and so many data bytes.
std::string File(const std::string& header, int64_t data_bytes) {
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) {
    out[i] = static_cast<char>(header.size() >> (8 * i));
  }
  return out + header + std::string(data_bytes, '\1');
}

std::string Reason(const absl::Status& status) {
  auto detail = GetErrorDetail(status);
  return detail.has_value() ? detail->reason : "(none)";
}

std::string WriteSample(const std::string& path) {
  const std::vector<float> a = {1.5f, -2.0f, 0.0f, 3.25f, 4.0f, -0.0f};
  const std::vector<uint16_t> b = {0x3f80, 0xc000};
  SafetensorsWriter writer(PosixFileSystem(), path,
                           {{"a", "F32", {2, 3}}, {"b", "BF16", {2}}});
  writer.Append(a.data(), 24);
  writer.Append(b.data(), 4);
  EXPECT_TRUE(writer.Finish().ok());
  EXPECT_EQ(writer.bytes_written(),
            static_cast<int64_t>(ReadFile(path).size()));
  return writer.digest();
}

TEST(SafetensorsTest, RoundTripByRange) {
  const std::string path = Path("x.safetensors");
  EXPECT_EQ(WriteSample(path).size(), 32u);
  auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->entries().at("a").shape, (std::vector<int64_t>{2, 3}));
  std::vector<float> values(3);
  ASSERT_TRUE((*file)->ReadFloats("a", 2, 3, values.data()).ok());
  EXPECT_EQ(values, (std::vector<float>{0.0f, 3.25f, 4.0f}));
  ASSERT_TRUE((*file)->ReadFloats("b", 0, 2, values.data()).ok());
  EXPECT_EQ(values[1], -2.0f);
  EXPECT_EQ((*file)->ReadFloats("a", 4, 3, values.data()).code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ((*file)->ReadFloats("a", -1, 2, values.data()).code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ((*file)->ReadFloats("c", 0, 1, values.data()).code(),
            absl::StatusCode::kNotFound);
}

TEST(SafetensorsTest, HalfPrecisionWidensExactly) {
  const std::string path = Path("x.safetensors");
  std::string bytes =
      File(R"({"h":{"dtype":"F16","shape":[5],"data_offsets":[0,10]}})", 0);
  for (uint16_t h : {0x3c00, 0xc000, 0x0001, 0x7bff, 0xfc00}) {
    bytes.push_back(static_cast<char>(h & 255));
    bytes.push_back(static_cast<char>(h >> 8));
  }
  WriteFile(path, bytes);
  auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  std::vector<float> values(5);
  ASSERT_TRUE((*file)->ReadFloats("h", 0, 5, values.data()).ok());
  EXPECT_EQ(values[0], 1.0f);
  EXPECT_EQ(values[1], -2.0f);
  EXPECT_EQ(values[2], 0x1p-24f);
  EXPECT_EQ(values[3], 65504.0f);
  EXPECT_EQ(values[4], -INFINITY);
}

TEST(SafetensorsTest, RefusesHostileHeaders) {
  const std::string deep =
      R"({"a":)" + std::string(200, '[') + std::string(200, ']') + "}";
  const std::vector<std::pair<const char*, std::string>> cases = {
      {"short", "abc"},
      {"huge header", std::string(7, '\xff') + '\x7f' + "{}"},
      {"header beyond the file", File("{}", 0).substr(0, 9)},
      {"not JSON", File("{x", 0)},
      {"an array", File("[]", 0)},
      {"deep", File(deep, 0)},
      {"negative offset",
       File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 4)},
      {"reversed",
       File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4)},
      {"outside",
       File(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4)},
      {"wrong size",
       File(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4)},
      {"negative dimension",
       File(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4)},
      {"overflow", File(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296,
          4294967296],"data_offsets":[0,4]}})",
                        4)},
      {"overflow to zero",
       File(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],
          "data_offsets":[0,0]}})",
            0)},
      {"unknown dtype",
       File(R"({"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}})", 4)},
      {"overlap", File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
          "b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                       4)},
      {"gap",
       File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8)},
      {"trailing bytes",
       File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 8)},
      {"twice", File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
          "a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                     4)},
      {"fraction",
       File(R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,6]}})", 6)},
      {"metadata of another kind", File(R"({"__metadata__":3})", 0)},
      {"metadata that is no text", File(R"({"__metadata__":{"a":1}})", 0)},
      {"minus zero",
       File(R"({"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}})", 0)},
      {"no offsets", File(R"({"a":{"dtype":"F32","shape":[1]}})", 4)},
  };
  for (const auto& [what, bytes] : cases) {
    const std::string path = Path("x.safetensors");
    WriteFile(path, bytes);
    auto file = SafetensorsFile::Open(path);
    ASSERT_FALSE(file.ok()) << what;
    EXPECT_EQ(Reason(file.status()), "SAFETENSORS_INVALID") << what;
  }
  EXPECT_EQ(Reason(SafetensorsFile::Open(Path("none")).status()),
            "MODEL_FILE_NOT_FOUND");
  EXPECT_EQ(Reason(SafetensorsFile::Open(testing::TempDir()).status()),
            "MODEL_FILE_NOT_FOUND");
}

TEST(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string path = Path("x.safetensors");
  WriteSample(path);
  const std::string whole = ReadFile(path);
  for (size_t size = 0; size < whole.size(); ++size) {
    WriteFile(path, whole.substr(0, size));
    EXPECT_FALSE(SafetensorsFile::Open(path).ok()) << size;
  }
}

TEST(SafetensorsTest, AFlippedHeaderByteNeverReadsOutside) {
  const std::string path = Path("x.safetensors");
  WriteSample(path);
  const std::string whole = ReadFile(path);
  for (size_t at = 0; at + 28 < whole.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bytes = whole;
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << bit));
      WriteFile(path, bytes);
      auto file = SafetensorsFile::Open(path);
      if (!file.ok()) continue;
      for (const auto& [name, entry] : (*file)->entries()) {
        EXPECT_GE(entry.offset, 8);
        EXPECT_LE(entry.offset + entry.bytes,
                  static_cast<int64_t>(bytes.size()));
      }
    }
  }
}

TEST(HfWeightsTest, ReadsShardsByIndex) {
  const std::string one = Path("model-00001-of-00002.safetensors");
  const std::string directory = one.substr(0, one.find_last_of('/'));
  const float values[2] = {1, 2};
  for (int i = 1; i <= 2; ++i) {
    const std::string path =
        directory + "/model-0000" + std::to_string(i) + "-of-00002.safetensors";
    std::filesystem::remove(path);
    SafetensorsWriter writer(PosixFileSystem(), path,
                             {{"t" + std::to_string(i), "F32", {1}}});
    writer.Append(&values[i - 1], 4);
    ASSERT_TRUE(writer.Finish().ok());
  }
  const std::string index = directory + "/model.safetensors.index.json";
  WriteFile(index, R"({"weight_map": {
      "t1": "model-00001-of-00002.safetensors",
      "t2": "model-00002-of-00002.safetensors"}})");
  auto weights = HfWeights::Open(directory);
  ASSERT_TRUE(weights.ok()) << weights.status();
  float value = 0;
  ASSERT_TRUE((*weights)->ReadFloats("t2", 0, 1, &value).ok());
  EXPECT_EQ(value, 2.0f);
  EXPECT_EQ((*weights)->Find("t3"), nullptr);
  for (const char* bad :
       {R"({"weight_map": {"t1": "../model-00001-of-00002.safetensors"}})",
        R"({"weight_map": {"t1": "/etc/passwd"}})",
        R"({"weight_map": {"t1": 3}})", R"({"weight_map": []})", R"({)",
        R"({"weight_map": {"t2": "model-00001-of-00002.safetensors"}})",
        R"({"weight_map": {"t1": "model-00001-of-00002.safetensors",
                           "t9": "model-00001-of-00002.safetensors"}})"}) {
    WriteFile(index, bad);
    EXPECT_EQ(Reason(HfWeights::Open(directory).status()),
              "SAFETENSORS_INVALID")
        << bad;
  }
}

TEST(SafetensorsIndexTest, SaysWhatTheFileSays) {
  const auto index = ParseSafetensorsIndex(
      R"({"metadata": {"total_size": 12, "total_parameters": 3},
          "weight_map": {"t1": "a.safetensors", "t2": "b"}})");
  ASSERT_TRUE(index.ok()) << index.status();
  EXPECT_EQ(index->total_size, 12);
  EXPECT_EQ(index->weight_map, (std::map<std::string, std::string>{
                                   {"t1", "a.safetensors"}, {"t2", "b"}}));
  for (const char* unknown :
       {R"({"weight_map": {}})", R"({"weight_map": {}, "metadata": 3})",
        R"({"weight_map": {}, "metadata": {"total_size": -1}})",
        R"({"weight_map": {}, "metadata": {"total_size": 1.5}})"}) {
    const auto bare = ParseSafetensorsIndex(unknown);
    ASSERT_TRUE(bare.ok()) << bare.status();
    EXPECT_EQ(bare->total_size, -1) << unknown;
  }
  for (const char* bad :
       {"", "[]", "3", "{}", R"({"weight_map": {"t": ""}})",
        R"({"weight_map": {"t": ".."}})", R"({"weight_map": {"t": "a/b"}})",
        R"({"weight_map": {"t": "a\u0000b"}})",
        R"({"weight_map": {}, "weight_map": {}})"}) {
    EXPECT_EQ(Reason(ParseSafetensorsIndex(bad).status()),
              "SAFETENSORS_INVALID")
        << bad;
  }
}

TEST(PublishTest, ADirectoryAppearsWholeOnce) {
  const std::string path = Path("parent") + "/snapshot";
  std::filesystem::remove_all(Path("parent"));
  FileSystem& files = PosixFileSystem();
  {
    auto pending = PendingDirectory::Create(files, path);
    ASSERT_TRUE(pending.ok()) << pending.status();
    ASSERT_TRUE(pending->Write("config.json", "{}").ok());
    EXPECT_FALSE(std::filesystem::exists(path));
    ASSERT_TRUE(pending->Publish().ok());
  }
  EXPECT_EQ(ReadFile(path + "/config.json"), "{}");
  EXPECT_EQ(Reason(PendingDirectory::Create(files, path).status()),
            "SNAPSHOT_EXISTS");
  {
    auto dropped = PendingDirectory::Create(files, path + "2");
    ASSERT_TRUE(dropped.ok());
    ASSERT_TRUE(dropped->Write("x", "y").ok());
  }
  // What is there when it comes to publishing is never replaced.
  {
    auto late = PendingDirectory::Create(files, path + "2");
    ASSERT_TRUE(late.ok());
    ASSERT_TRUE(files.MakeDirectory(path + "2").ok());
    EXPECT_EQ(Reason(late->Publish()), "SNAPSHOT_EXISTS");
  }
  EXPECT_EQ(*files.List(Path("parent")),
            (std::vector<std::string>{"snapshot", "snapshot2"}));
}

TEST(PublishTest, LeftoversAreRemovedAndNothingElse) {
  CrashFileSystem files(
      {.files = {{"/s/.a.pending/x", ""},
                 {"/s/.a~b.pending/x", ""},
                 {"/s/.b~a.pending/x", ""},
                 {"/s/b.pending/x", ""},
                 {"/s/.c~removed/x", ""}},
       .directories = {"/s", "/s/.a.pending", "/s/.a~b.pending",
                       "/s/.b~a.pending", "/s/b.pending", "/s/.c~removed"}});
  auto pending = PendingDirectory::Create(files, "/s/a", "p");
  ASSERT_TRUE(pending.ok()) << pending.status();
  EXPECT_EQ(*files.List("/s"), (std::vector<std::string>{
                                   ".a~p.pending", ".c~removed", "b.pending"}));
  std::string parent;
  EXPECT_EQ(PendingName(".a~p.pending", &parent), "a");
  EXPECT_EQ(parent, "p");
  EXPECT_EQ(PendingName(".a.b.pending", &parent), "a.b");
  EXPECT_EQ(parent, "");
  for (const char* name : {"a", ".pending", "a.pending", ".a.pendin"}) {
    EXPECT_EQ(PendingName(name), "") << name;
  }
}

TEST(PublishTest, SmallFilesHaveALimit) {
  WriteFile(Path("f"), "12345");
  EXPECT_EQ(*ReadSmallFile(Path("f"), 5), "12345");
  EXPECT_EQ(Reason(ReadSmallFile(Path("f"), 4).status()),
            "MODEL_CONFIG_INVALID");
  EXPECT_EQ(Reason(ReadSmallFile(Path("g"), 4).status()),
            "MODEL_FILE_NOT_FOUND");
}

}  // namespace
}  // namespace gradwire
