// SPDX-License-Identifier: Apache-2.0
// Whole deltas: made, read, applied; and refused.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checkpoint/delta/apply.h"
#include "checkpoint/delta/delta_testing.h"
#include "checkpoint/delta/encode.h"
#include "checkpoint/safetensors.h"

namespace gradwire {
namespace {

constexpr int64_t kChunk = kChunkElements;

// Two sets of weights with every kind of tensor and change.
struct Change {
  explicit Change(uint32_t seed) : random(seed) {
    FloatBytes floats{random};
    auto any = [this] { return static_cast<uint8_t>(random()); };
    before.Add({"block.0.wq", "BF16", {3, kChunk / 2 + 7}}, floats);
    before.Add({"block.0.wk", "BF16", {kChunk}}, floats);
    before.Add({"norm", "F32", {kChunk + 3}}, any);
    before.Add({"norm.kept", "F32", {33}}, any);
    before.Add({"scale", "F16", {}}, any);
    before.Add({"kept", "BF16", {100, 3}}, floats);
    before.Add({"empty", "BF16", {0, 4}}, any);
    before.Add({"bytes", "U8", {777}}, any);
    before.Add({"counts", "I64", {9}}, any);
    before.Add({"a", "BF16", {kChunk - 1}}, floats);
    before.Add({"b", "BF16", {kChunk + 1}}, floats);
    before.Add({"c", "BF16", {1}}, floats);
    after = before;
    const double density = kDensities[seed % std::size(kDensities)];
    for (size_t i = 0; i < after.size(); ++i) {
      const TensorInfo& info = after.info(i);
      if (info.name.find("kept") != std::string::npos) continue;
      if (IsFloat16(info.dtype)) {
        ChangeSome(after.data<uint16_t>(i), info.num_elements(), density,
                   random);
      } else if (info.num_elements() > 0 && density > 0) {
        after.data(i)[random() % static_cast<uint64_t>(after.bytes(i))] ^= 0x41;
      }
    }
  }
  static constexpr double kDensities[] = {0,   0.001, 0.01, 0.05, 0.14, 0.16,
                                          0.4, 0.59,  0.61, 0.8,  1};

  std::mt19937 random;
  TestWeights before, after;
};

// The delta applies to `before` and makes `after`.
void ExpectApplies(const std::string& file, const TestWeights& before,
                   const TestWeights& after, ThreadPool* pool = nullptr) {
  const auto delta = DeltaFile::Parse(file);
  ASSERT_TRUE(delta.ok()) << delta.status();
  TestWeights weights = before;
  std::string id = before.id();
  const absl::Status status = ApplyDelta(*delta, weights.tensors(), id, pool);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(weights == after);
  EXPECT_EQ(id, after.id());
  EXPECT_EQ(delta->info().id, after.id());
}

TEST(DeltaTest, EveryKindOfTensorComesBack) {
  for (uint32_t seed = 0; seed < 22; ++seed) {
    SCOPED_TRACE(seed);
    const Change change(seed);
    DeltaOptions options = OptionsFor(change.before);
    options.fast = seed % 3 == 2;
    const auto file =
        EncodeDelta(change.before.views(), change.after.views(), options);
    ASSERT_TRUE(file.ok()) << file.status();
    ExpectApplies(*file, change.before, change.after);
  }
}

TEST(DeltaTest, SaysWhatChanged) {
  const Change change(2);
  const auto file = EncodeDelta(change.before.views(), change.after.views(),
                                OptionsFor(change.before));
  const auto delta = DeltaFile::Parse(*file);
  ASSERT_TRUE(delta.ok()) << delta.status();
  EXPECT_EQ(delta->tensors().size(), change.before.size());
  for (const DeltaTensor& tensor : delta->tensors()) {
    const std::string& name = tensor.info.name;
    EXPECT_FALSE(tensor.fresh);
    if (name == "kept" || name == "norm.kept" || name == "empty") {
      EXPECT_FALSE(tensor.changed()) << name;
    }
    if (name != "norm") continue;
    const auto rows = DeltaFile::ReadRows(tensor);
    ASSERT_TRUE(rows.ok());
    ASSERT_EQ(rows->size(), 2u);
    EXPECT_EQ((*rows)[0].method, ChunkMethod::kRaw);
    EXPECT_EQ((*rows)[1].method, ChunkMethod::kUnchanged);
  }
  const DeltaInfo& info = delta->info();
  EXPECT_EQ(info.model, "test");
  EXPECT_EQ(info.step, 7);
  EXPECT_EQ(info.chain_length, 1);
  EXPECT_EQ(info.prev_id, change.before.id());
}

TEST(DeltaTest, NothingChangedIsADeltaToo) {
  const Change change(0);
  const auto file = EncodeDelta(change.before.views(), change.before.views(),
                                OptionsFor(change.before));
  ExpectApplies(*file, change.before, change.before);
  EXPECT_EQ(DeltaFile::Parse(*file)->info().id, change.before.id());
  const auto none = EncodeDelta({}, {}, OptionsFor(TestWeights()));
  ASSERT_TRUE(none.ok());
  ExpectApplies(*none, TestWeights(), TestWeights());
}

TEST(DeltaTest, FreshTensorsAreStoredWhole) {
  std::mt19937 random(1);
  FloatBytes floats{random};
  TestWeights before, after;
  before.Add({"gone", "BF16", {5}}, floats);
  before.Add({"reshaped", "BF16", {6}}, floats);
  before.Add({"retyped", "F32", {6}}, floats);
  after.Add({"new", "BF16", {kChunk + 2}}, floats);
  after.Add({"new.empty", "F32", {0}}, floats);
  after.Add({"reshaped", "BF16", {2, 3}}, floats);
  after.Add({"retyped", "F16", {6}}, floats);
  const auto file =
      EncodeDelta(before.views(), after.views(), OptionsFor(before));
  ASSERT_TRUE(file.ok()) << file.status();
  const auto delta = DeltaFile::Parse(*file);
  ASSERT_TRUE(delta.ok()) << delta.status();
  TestWeights weights = after;
  for (size_t i = 0; i < weights.size(); ++i) {
    std::memset(weights.data(i), 0x5a, static_cast<size_t>(weights.bytes(i)));
  }
  std::string id = before.id();
  ASSERT_TRUE(ApplyDelta(*delta, weights.tensors(), id).ok());
  EXPECT_TRUE(weights == after);
  EXPECT_EQ(id, after.id());
}

TEST(DeltaTest, GroupsEndAfter128Chunks) {
  std::mt19937 random(3);
  TestWeights before;
  before.Add({"w", "BF16", {129 * kChunk + 5}}, FloatBytes{random});
  TestWeights after = before;
  for (const int64_t i : {int64_t{0}, 128 * kChunk - 1, 128 * kChunk,
                          129 * kChunk, 129 * kChunk + 4}) {
    ++after.data<uint16_t>(0)[i];
  }
  const auto file =
      EncodeDelta(before.views(), after.views(), OptionsFor(before));
  const auto delta = DeltaFile::Parse(*file);
  ASSERT_TRUE(delta.ok()) << delta.status();
  ASSERT_EQ(delta->tensors()[0].groups.size(), 2u);
  EXPECT_EQ(delta->tensors()[0].groups[0].chunks, 128);
  EXPECT_EQ(delta->tensors()[0].groups[1].chunks, 2);
  ExpectApplies(*file, before, after);
}

TEST(DeltaTest, ShardsOfRanksMakeTheSameFile) {
  for (const uint32_t seed : {1u, 3u, 6u, 9u}) {
    std::mt19937 random(seed);
    TestWeights before;
    before.Add({"w", "BF16", {7 * kChunk + 99}}, FloatBytes{random});
    before.Add({"v", "F32", {300}}, FloatBytes{random});
    TestWeights after = before;
    ChangeSome(after.data<uint16_t>(0), 7 * kChunk + 99,
               Change::kDensities[seed], random);
    DeltaOptions options = OptionsFor(before);
    const std::vector<int64_t> begins = {0, 2 * kChunk, 3 * kChunk, 7 * kChunk};
    options.shard_begins["w"] = {begins.begin() + 1, begins.end()};
    const auto whole = EncodeDelta(before.views(), after.views(), options);
    ASSERT_TRUE(whole.ok()) << whole.status();

    std::vector<EncodedTensor> tensors(2);
    tensors[0].info = before.info(0);
    for (size_t s = 0; s < begins.size(); ++s) {
      const int64_t end =
          s + 1 < begins.size() ? begins[s + 1] : 7 * kChunk + 99;
      for (EncodedGroup& group : EncodeShard(
               "BF16", before.data<uint16_t>(0) + begins[s],
               after.data<uint16_t>(0) + begins[s], end - begins[s], false)) {
        tensors[0].groups.push_back(std::move(group));
      }
    }
    tensors[1].info = before.info(1);
    tensors[1].groups =
        EncodeShard("F32", before.data(1), after.data(1), 300, false);
    const auto pieces = AssembleDelta(std::move(tensors), options);
    ASSERT_TRUE(pieces.ok());
    EXPECT_EQ(*pieces, *whole);
    ExpectApplies(*whole, before, after);
  }
}

TEST(DeltaTest, ThreadsMakeTheSameFile) {
  ThreadPool pool(3);
  const Change change(5);
  DeltaOptions options = OptionsFor(change.before);
  options.shard_begins["block.0.wq"] = {kChunk};
  const auto one =
      EncodeDelta(change.before.views(), change.after.views(), options);
  options.pool = &pool;
  const auto three =
      EncodeDelta(change.before.views(), change.after.views(), options);
  EXPECT_EQ(*one, *three);
  EXPECT_EQ(ComputeWeightId(change.after.views(), &pool), change.after.id());
  ExpectApplies(*one, change.before, change.after, &pool);
}

TEST(DeltaTest, WrongShardsAreRefused) {
  const Change change(1);
  for (const std::vector<int64_t>& begins : {std::vector<int64_t>{5},
                                             {0},
                                             {-kChunk},
                                             {2 * kChunk},
                                             {kChunk, kChunk}}) {
    DeltaOptions options = OptionsFor(change.before);
    options.shard_begins["block.0.wq"] = begins;
    const auto file =
        EncodeDelta(change.before.views(), change.after.views(), options);
    EXPECT_EQ(ReasonOf(file.status()), "DELTA_INVALID");
  }
}

TEST(DeltaTest, BadRequestsAreRefused) {
  std::mt19937 random(1);
  TestWeights good;
  good.Add({"w", "BF16", {4}}, FloatBytes{random});
  const DeltaOptions options = OptionsFor(good);
  auto reason = [&](std::vector<TensorView> after, const DeltaOptions& o) {
    return ReasonOf(EncodeDelta(good.views(), after, o).status());
  };
  const TensorView view = good.views()[0];
  TensorView other = view;
  other.info.dtype = "F4";
  EXPECT_EQ(reason({other}, options), "DELTA_INVALID");
  other = view;
  for (const char* name : {"", "caf\xc3\xa9", "a\nb"}) {
    other.info.name = name;
    EXPECT_EQ(reason({other}, options), "DELTA_INVALID") << name;
  }
  EXPECT_EQ(reason({view, view}, options), "DELTA_INVALID");
  DeltaOptions bad = options;
  bad.prev_id = "1234";
  EXPECT_EQ(reason({view}, bad), "DELTA_INVALID");
  bad = options;
  bad.chain_length = 0;
  EXPECT_EQ(reason({view}, bad), "DELTA_INVALID");
}

TEST(DeltaTest, AnotherParentIsRefusedBeforeAnythingIsRead) {
  const Change change(4);
  const auto delta = DeltaFile::Parse(*EncodeDelta(
      change.before.views(), change.after.views(), OptionsFor(change.before)));
  TestWeights weights = change.after;
  std::string id = change.after.id();
  const absl::Status status = ApplyDelta(*delta, weights.tensors(), id);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(status), "DELTA_PARENT_MISMATCH");
  EXPECT_EQ(GetErrorDetail(status)->metadata.at("expected"),
            change.before.id());
  EXPECT_EQ(GetErrorDetail(status)->metadata.at("have"), change.after.id());
  EXPECT_TRUE(weights == change.after);
  EXPECT_EQ(id, change.after.id());
}

TEST(DeltaTest, OtherTensorsAreRefused) {
  const Change change(4);
  const auto delta = DeltaFile::Parse(*EncodeDelta(
      change.before.views(), change.after.views(), OptionsFor(change.before)));
  std::string id = change.before.id();
  TestWeights weights = change.before;
  std::vector<MutableTensor> tensors = weights.tensors();
  tensors.pop_back();
  EXPECT_EQ(ReasonOf(ApplyDelta(*delta, tensors, id)), "DELTA_INVALID");
  for (const char* field : {"name", "dtype", "shape"}) {
    tensors = weights.tensors();
    TensorInfo& info = tensors[0].info;
    if (field == std::string("name")) info.name = "else";
    if (field == std::string("dtype")) info.dtype = "F16";
    if (field == std::string("shape")) info.shape = {info.num_elements()};
    EXPECT_EQ(ReasonOf(ApplyDelta(*delta, tensors, id)), "DELTA_INVALID");
  }
  tensors = weights.tensors();
  tensors[1] = tensors[0];
  EXPECT_EQ(ReasonOf(ApplyDelta(*delta, tensors, id)), "DELTA_INVALID");
  EXPECT_TRUE(weights == change.before);
}

// The receiver believes to have the parent, and has not.
TEST(DeltaTest, AWrongBaseIsFoundAndLeftAlone) {
  ThreadPool pool(2);
  for (uint32_t seed = 1; seed < 30; ++seed) {
    if (seed % 11 == 0) continue;
    Change change(seed);
    const auto delta = DeltaFile::Parse(
        *EncodeDelta(change.before.views(), change.after.views(),
                     OptionsFor(change.before)));
    TestWeights wrong = change.before;
    // A float of a tensor that has changed, at the end of the order by name.
    const size_t tensor = 0;
    ASSERT_EQ(wrong.info(tensor).name, "block.0.wq");
    const uint64_t at = change.random() % (3 * (kChunk / 2 + 7));
    wrong.data<uint16_t>(tensor)[at] ^=
        static_cast<uint16_t>(1 << change.random() % 16);
    TestWeights weights = wrong;
    std::string id = change.before.id();
    const absl::Status status =
        ApplyDelta(*delta, weights.tensors(), id, seed % 2 ? &pool : nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_EQ(ReasonOf(status), "DELTA_CORRUPT");
    EXPECT_EQ(GetErrorDetail(status)->metadata.at("field"), "block.0.wq");
    EXPECT_TRUE(weights == wrong);
    EXPECT_EQ(id, change.before.id());
  }
}

TEST(DeltaTest, AChainEndsWhereTheFullWeightsAre) {
  std::mt19937 random(8);
  TestWeights base;
  base.Add({"w", "BF16", {kChunk + 10}}, FloatBytes{random});
  TestWeights receiver = base, weights = base;
  std::string id = base.id();
  for (int step = 0; step < 30; ++step) {
    TestWeights next = weights;
    ChangeSome(next.data<uint16_t>(0), kChunk + 10, step % 5 * 0.2, random);
    DeltaOptions options = OptionsFor(weights);
    options.base_id = base.id();
    options.chain_length = step + 1;
    const auto delta =
        DeltaFile::Parse(*EncodeDelta(weights.views(), next.views(), options));
    ASSERT_TRUE(ApplyDelta(*delta, receiver.tensors(), id).ok());
    EXPECT_EQ(delta->info().chain_length, step + 1);
    weights = next;
  }
  EXPECT_TRUE(receiver == weights);
  EXPECT_EQ(id, weights.id());
}

TEST(DeltaTest, FilesAppearWholeOrNot) {
  const std::string directory = testing::TempDir() + "/delta_files";
  std::filesystem::remove_all(directory);
  std::filesystem::create_directories(directory);
  const Change change(4);
  const std::string file = *EncodeDelta(
      change.before.views(), change.after.views(), OptionsFor(change.before));
  const std::string path = directory + "/d.safetensors";
  ASSERT_TRUE(WriteFileWhole(path, "old").ok());
  ASSERT_TRUE(WriteFileWhole(path, file).ok());
  int files = 0;
  for ([[maybe_unused]] const auto& entry :
       std::filesystem::directory_iterator(directory)) {
    ++files;
  }
  EXPECT_EQ(files, 1);
  const auto delta = DeltaFile::Open(path);
  ASSERT_TRUE(delta.ok()) << delta.status();
  EXPECT_EQ(delta->size(), static_cast<int64_t>(file.size()));
  // To everybody else it is a safetensors file.
  const auto plain = SafetensorsFile::Open(path);
  ASSERT_TRUE(plain.ok()) << plain.status();
  for (const auto& [name, entry] : (*plain)->entries()) {
    EXPECT_EQ(entry.dtype, "U8") << name;
  }
  EXPECT_EQ(WriteFileWhole(directory + "/none/d", file).code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(ReasonOf(DeltaFile::Open(directory + "/none").status()),
            "MODEL_FILE_NOT_FOUND");
}

}  // namespace
}  // namespace gradwire
