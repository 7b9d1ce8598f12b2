// SPDX-License-Identifier: Apache-2.0
// Saving by some ranks and loading by others.
#include "checkpoint/training_state.h"

#include <gtest/gtest.h>

#include <random>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/state_testing.h"

namespace gradwire {
namespace {

constexpr char kDirectory[] = "/step-17";

TEST(TrainingStateTest, IsReadByAnyNumberOfRanks) {
  for (const auto moments : {std::optional<DType>(), std::optional(DType::kF32),
                             std::optional(DType::kBF16)}) {
    const TestState state = MakeState(331, 5, moments);
    for (const int writers : {1, 2, 3, 5}) {
      for (const int64_t chunk_bytes : {1, 7, 64, 100'000}) {
        CrashFileSystem files;
        const auto saved =
            Save(files, kDirectory, state,
                 DealPieces(state, writers, writers + 10), chunk_bytes);
        ASSERT_TRUE(saved.ok()) << saved.status();
        for (const int readers : {1, 2, 3, 4, 5, 7}) {
          // Each reads its even share.
          for (int rank = 0; rank < readers; ++rank) {
            auto reader = *StateReader::Open(files, kDirectory);
            EXPECT_EQ(reader->world(), writers);
            EXPECT_EQ(reader->dtype("m"), moments);
            const int64_t begin = 331 * rank / readers;
            const int64_t count = 331 * (rank + 1) / readers - begin;
            for (const auto& [vector, dtype] : state.dtypes) {
              const StatePiece piece = {vector, dtype, begin, count};
              const std::string_view expected = PieceOf(state, piece);
              std::string read(expected.size(), '\0');
              ASSERT_TRUE(reader->Read(vector, begin, count, read.data()).ok());
              ASSERT_EQ(read, expected);
            }
          }
        }
      }
    }
  }
}

// One reader, so that chunks are partly verified, partly not.
TEST(TrainingStateTest, IsReadInAnyOrder) {
  const TestState state = MakeState(200, 6, DType::kBF16);
  std::mt19937 random(1);
  for (int draw = 0; draw < 30; ++draw) {
    CrashFileSystem files;
    ASSERT_TRUE(Save(files, kDirectory, state, DealPieces(state, 3, random()),
                     1 + random() % 300)
                    .ok());
    auto reader = *StateReader::Open(files, kDirectory);
    for (int i = 0; i < 40; ++i) {
      const char* vector = i % 3 == 0 ? "weight" : i % 3 == 1 ? "m" : "v";
      const int64_t begin = random() % 201;
      const int64_t count = random() % (201 - begin);
      if (i % 5 == 0) {
        ASSERT_TRUE(reader->Verify(vector, begin, count).ok());
      }
      const std::string_view expected =
          PieceOf(state, {vector, state.dtypes.at(vector), begin, count});
      std::string read(expected.size(), '\0');
      ASSERT_TRUE(reader->Read(vector, begin, count, read.data()).ok());
      ASSERT_EQ(read, expected);
    }
  }
}

TEST(TrainingStateTest, AChunkIsReadOnce) {
  const TestState state = MakeState(64, 7, std::nullopt);
  CrashFileSystem files;
  ASSERT_TRUE(
      Save(files, kDirectory, state, {{{"weight", DType::kF32, 0, 64}}}, 64)
          .ok());
  auto reader = *StateReader::Open(files, kDirectory);
  const int64_t opened = files.calls();
  // The file, the manifest again (its name, size and text), four chunks.
  const int64_t expected = 1 + 3 + 4;
  ASSERT_TRUE(reader->Verify("weight", 0, 64).ok());
  EXPECT_EQ(files.calls(), opened + expected);
  ASSERT_TRUE(reader->Verify("weight", 0, 64).ok());
  EXPECT_EQ(files.calls(), opened + expected);
  auto other = *StateReader::Open(files, kDirectory);
  const int64_t before = files.calls();
  std::string read(256, '\0');
  ASSERT_TRUE(other->Read("weight", 0, 64, read.data()).ok());
  EXPECT_EQ(files.calls(), before + expected);
  EXPECT_EQ(read, state.bytes.at("weight"));
}

TEST(TrainingStateTest, SaysWhatItIs) {
  const TestState state = MakeState(50, 8, DType::kF32);
  CrashFileSystem files;
  const auto pieces = DealPieces(state, 2, 1);
  const auto saved = Save(files, kDirectory, state, pieces, 64);
  ASSERT_TRUE(saved.ok());
  auto reader = *StateReader::Open(files, kDirectory);
  EXPECT_EQ(reader->summary().bytes, saved->bytes);
  EXPECT_EQ(reader->summary().digest, saved->digest);
  EXPECT_EQ(saved->digest.size(), 32u);
  int64_t bytes = 0;
  for (const auto& [path, content] : files.Latest().files) {
    bytes += std::ssize(content);
  }
  EXPECT_EQ(saved->bytes, bytes);
  // Other elements, another digest.
  TestState other = state;
  other.bytes["m"][3] ^= 1;
  const auto saved_other = Save(files, "/other", other, pieces, 64);
  EXPECT_NE(saved_other->digest, saved->digest);
}

TEST(TrainingStateTest, ARankMayOwnNothing) {
  const TestState state = MakeState(10, 9, std::nullopt);
  CrashFileSystem files;
  absl::Status status;
  ASSERT_TRUE(
      Save(files, kDirectory, state,
           {{},
            {{"weight", DType::kF32, 0, 10}, {"weight", DType::kF32, 10, 0}},
            {}},
           64)
          .ok());
  EXPECT_EQ(Compare(files, kDirectory, state, &status), "");
}

TEST(TrainingStateTest, IsSavedInRealFilesByChunksOfDefaultSize) {
  const std::string directory = testing::TempDir() + "/step-3";
  const TestState state = MakeState(300'000, 10, DType::kBF16);
  absl::Status status;
  const auto saved =
      Save(PosixFileSystem(), directory, state, DealPieces(state, 3, 4),
           StateWriterOptions().chunk_bytes);
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(Compare(PosixFileSystem(), directory, state, &status), "");
  EXPECT_FALSE(PosixFileSystem().Stat(PendingPath(directory)).ok());
  EXPECT_EQ(
      ReasonOf(PendingState::Create(PosixFileSystem(), directory).status()),
      "CHECKPOINT_EXISTS");
}

// More than the slices and windows in which bytes are written and verified.
TEST(TrainingStateTest, LongPiecesAreWrittenInSlices) {
  const TestState state = MakeState(2'500'000, 11, std::nullopt);
  const std::string directory = testing::TempDir() + "/long";
  absl::Status status;
  ASSERT_TRUE(Save(PosixFileSystem(), directory, state, DealPieces(state, 2, 4),
                   6'000'001)
                  .ok());
  EXPECT_EQ(Compare(PosixFileSystem(), directory, state, &status), "");
  // Within a chunk that is not verified yet, over more than a window.
  auto reader = *StateReader::Open(PosixFileSystem(), directory);
  std::string read(5'000'000, '\0');
  ASSERT_TRUE(reader->Read("weight", 700'000, 1'250'000, read.data()).ok());
  EXPECT_TRUE(read == state.bytes.at("weight").substr(2'800'000, 5'000'000));
}

TEST(StateWriterTest, TheFirstMistakeSticks) {
  const std::string zeros(100, '\0');
  const DType f32 = DType::kF32;
  const std::vector<StatePiece> wrong = {
      {"other", f32, 0, 1},
      {"", f32, 0, 1},
      {"weight", DType::kBF16, 0, 1},
      {"m", DType::kI32, 0, 1},
      {"weight", f32, -1, 1},
      {"weight", f32, 0, -1},
      {"weight", f32, INT64_MAX, 1},
      {"weight", f32, 0, INT64_MAX},
      {"weight", f32, int64_t{1} << 48, int64_t{1} << 48}};
  CrashFileSystem files;
  int rank = 0;
  for (const StatePiece& piece : wrong) {
    auto writer = *StateWriter::Create(files, "", rank++);
    EXPECT_EQ(ReasonOf(writer->Begin(piece)), "STATE_PIECES_INVALID");
    EXPECT_EQ(ReasonOf(writer->Begin({"weight", f32, 0, 1})),
              "STATE_PIECES_INVALID");
    EXPECT_EQ(ReasonOf(writer->Finish()), "STATE_PIECES_INVALID");
  }
  const StatePiece two = {"weight", f32, 0, 2};
  auto writer = *StateWriter::Create(files, "", rank++);
  EXPECT_FALSE(writer->Write(zeros.data(), 1).ok());
  EXPECT_FALSE(writer->Begin(two).ok());
  for (const int64_t bytes : {-1, 9}) {
    writer = *StateWriter::Create(files, "", rank++);
    ASSERT_TRUE(writer->Begin(two).ok());
    EXPECT_FALSE(writer->Write(zeros.data(), bytes).ok());
    EXPECT_EQ(ReasonOf(writer->Finish()), "STATE_PIECES_INVALID");
  }
  for (const bool finish : {true, false}) {
    writer = *StateWriter::Create(files, "", rank++);
    ASSERT_TRUE(writer->Begin(two).ok());
    ASSERT_TRUE(writer->Write(zeros.data(), 7).ok());
    EXPECT_EQ(ReasonOf(finish ? writer->Finish() : writer->Begin(two)),
              "STATE_PIECES_INVALID");
  }
  EXPECT_FALSE(StateWriter::Create(files, "", 0).ok());
}

TEST(StateReaderTest, SaysWhatIsNotThere) {
  CrashFileSystem files({.files = {{"/hf/config.json", "{}"}, {"/file", "x"}},
                         .directories = {"/hf", "/empty"}});
  const auto reason = [&](const char* directory) {
    return ReasonOf(StateReader::Open(files, directory).status());
  };
  EXPECT_EQ(reason("/none"), "CHECKPOINT_NOT_FOUND");
  EXPECT_EQ(reason("/empty"), "CHECKPOINT_NOT_FOUND");
  EXPECT_EQ(reason("/file"), "CHECKPOINT_NOT_FOUND");
  EXPECT_EQ(reason("/hf"), "CHECKPOINT_KIND_MISMATCH");
  const auto detail = GetErrorDetail(StateReader::Open(files, "/hf").status());
  EXPECT_EQ(detail->metadata.at("checkpoint"), "hf");

  const TestState state = MakeState(10, 1, std::nullopt);
  ASSERT_TRUE(Save(files, kDirectory, state, DealPieces(state, 2, 1), 64).ok());
  auto reader = *StateReader::Open(files, kDirectory);
  char out[64];
  for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{-1, 1},
                                     {0, 11},
                                     {11, 0},
                                     {10, 1},
                                     {0, -1},
                                     {1, INT64_MAX},
                                     {INT64_MAX, 1}}) {
    EXPECT_EQ(ReasonOf(reader->Read("weight", begin, count, out)),
              "STATE_PIECES_INVALID");
  }
  EXPECT_EQ(ReasonOf(reader->Read("m", 0, 1, out)), "STATE_PIECES_INVALID");
  EXPECT_TRUE(reader->Read("weight", 10, 0, out).ok());
  EXPECT_EQ(reader->dtype("m"), std::nullopt);
}

}  // namespace
}  // namespace gradwire
