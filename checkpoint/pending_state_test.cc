// SPDX-License-Identifier: Apache-2.0
// What is published, what is refused, and what is removed.
#include <gtest/gtest.h>

#include "base/error.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/state_testing.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

using Pieces = std::vector<std::vector<StatePiece>>;

constexpr char kDirectory[] = "/step-17";

std::string PublishReason(const Pieces& pieces, int world,
                          int64_t num_parameters = 10) {
  const TestState state = MakeState(100, 1, DType::kF32);
  CrashFileSystem files;
  auto pending = *PendingState::Create(files, kDirectory);
  for (size_t rank = 0; rank < pieces.size(); ++rank) {
    const absl::Status written = WriteRank(
        files, pending.path(), state, static_cast<int>(rank), pieces[rank], 64);
    if (!written.ok()) return ReasonOf(written) + " of a rank";
  }
  StateHeader header = state.header;
  header.num_parameters = num_parameters;
  const absl::Status published = pending.Publish(header, world).status();
  // What was refused is not there.
  EXPECT_EQ(files.Stat(kDirectory).ok(), published.ok());
  return ReasonOf(published);
}

TEST(PublishTest, RefusesWhatIsNotWholeAndOnce) {
  const DType f32 = DType::kF32, bf16 = DType::kBF16;
  const std::string invalid = "STATE_PIECES_INVALID";
  const std::vector<StatePiece> weight = {{"weight", f32, 0, 10}};
  EXPECT_EQ(PublishReason({weight}, 1), "");
  EXPECT_EQ(PublishReason({{}}, 1), invalid);
  // Missing at the begin, within, at the end.
  EXPECT_EQ(PublishReason({{{"weight", f32, 1, 9}}}, 1), invalid);
  EXPECT_EQ(
      PublishReason({{{"weight", f32, 0, 4}}, {{"weight", f32, 5, 5}}}, 2),
      invalid);
  EXPECT_EQ(PublishReason({{{"weight", f32, 0, 9}}}, 1), invalid);
  // Twice, in one rank and in two.
  EXPECT_EQ(PublishReason({{{"weight", f32, 0, 6}, {"weight", f32, 5, 5}}}, 1),
            invalid);
  EXPECT_EQ(PublishReason({weight, {{"weight", f32, 3, 1}}}, 2), invalid);
  EXPECT_EQ(PublishReason({weight, weight}, 2), invalid);
  // One twice and one not at all: as many as there should be.
  EXPECT_EQ(PublishReason({{{"weight", f32, 0, 6},
                            {"weight", f32, 5, 1},
                            {"weight", f32, 7, 3}}},
                          1),
            invalid);
  // Elements that the model has not.
  EXPECT_EQ(PublishReason({{{"weight", f32, 0, 11}}}, 1), invalid);
  EXPECT_EQ(PublishReason({weight, {{"weight", f32, 10, 1}}}, 2), invalid);
  // Ranks that are missing, or too many.
  EXPECT_EQ(PublishReason({weight}, 2), invalid);
  EXPECT_EQ(PublishReason({weight, {}}, 1), invalid);
  EXPECT_EQ(PublishReason({weight}, 0), invalid);
  // One of the moments, or in two dtypes.
  const std::vector<StatePiece> with_m = {weight[0], {"m", f32, 0, 10}};
  EXPECT_EQ(PublishReason({with_m}, 1), invalid);
  EXPECT_EQ(PublishReason({with_m, {{"v", f32, 0, 9}}}, 2), invalid);
  EXPECT_EQ(PublishReason({with_m, {{"v", f32, 0, 9}, {"v", bf16, 9, 1}}}, 2),
            invalid);
  EXPECT_EQ(PublishReason({with_m, {{"v", bf16, 0, 10}}}, 2), "");
  EXPECT_EQ(PublishReason({weight}, 1, 0), "STATE_HEADER_INVALID");
}

TEST(PublishTest, SaysWhichElement) {
  const TestState state = MakeState(100, 1, std::nullopt);
  const DType f32 = DType::kF32;
  // Pieces for 10 elements, and the element that is named.
  const std::vector<std::pair<std::vector<StatePiece>, std::string>> cases = {
      {{{"weight", f32, 0, 12}}, "12"},
      {{{"weight", f32, 0, 7}}, "7"},
      {{{"weight", f32, 8, 2}, {"weight", f32, 0, 6}}, "6"},
      {{{"weight", f32, 4, 6}, {"weight", f32, 0, 5}}, "4"}};
  for (const auto& [pieces, element] : cases) {
    CrashFileSystem files;
    auto pending = *PendingState::Create(files, kDirectory);
    ASSERT_TRUE(WriteRank(files, pending.path(), state, 0, pieces, 64).ok());
    StateHeader header = state.header;
    header.num_parameters = 10;
    const absl::Status status = pending.Publish(header, 1).status();
    const auto detail = GetErrorDetail(status);
    EXPECT_EQ(detail->metadata.at("field"), "weight");
    EXPECT_EQ(detail->metadata.at("value"), element);
    // Not as one that is missing.
    EXPECT_EQ(status.message().find("behind the model") != std::string::npos,
              element == "12");
  }
}

TEST(PublishTest, RefusesARankThatHasNotFinished) {
  const TestState state = MakeState(10, 1, std::nullopt);
  CrashFileSystem files;
  auto pending = *PendingState::Create(files, kDirectory);
  auto writer = *StateWriter::Create(files, pending.path(), 0);
  ASSERT_TRUE(writer->Begin({"weight", DType::kF32, 0, 10}).ok());
  ASSERT_TRUE(writer->Write(state.bytes.at("weight").data(), 40).ok());
  EXPECT_EQ(ReasonOf(pending.Publish(state.header, 1).status()),
            "STATE_PIECES_INVALID");
  ASSERT_TRUE(writer->Finish().ok());
  EXPECT_TRUE(pending.Publish(state.header, 1).ok());
}

TEST(PublishTest, RefusesAHeaderThatCannotBeKept) {
  CrashFileSystem files;
  auto pending = *PendingState::Create(files, kDirectory);
  const StateHeader good = MakeState(10, 1, std::nullopt).header;
  for (int i = 0; i < 6; ++i) {
    StateHeader header = good;
    if (i == 0) header.num_parameters = -1;
    if (i == 1) header.num_parameters = int64_t{1} << 49;
    if (i == 2) header.optimizer_step = -1;
    if (i == 3) header.weight_version = -1;
    if (i == 4) header.model_digest = "\xff";
    if (i == 5) header.attributes["a"] = std::string(1 << 21, 'a');
    EXPECT_EQ(ReasonOf(pending.Publish(header, 1).status()),
              "STATE_HEADER_INVALID")
        << i;
  }
}

TEST(PublishTest, ReplacesNothing) {
  const TestState state = MakeState(10, 1, std::nullopt);
  const Pieces pieces = DealPieces(state, 2, 1);
  // Made after the pending one: an empty directory, too, which a renaming would
  // replace.
  for (const bool empty : {true, false}) {
    CrashFileSystem files;
    auto pending = *PendingState::Create(files, kDirectory);
    for (int rank = 0; rank < 2; ++rank) {
      ASSERT_TRUE(WriteRank(files, pending.path(), state, rank,
                            pieces[static_cast<size_t>(rank)], 64)
                      .ok());
    }
    ASSERT_TRUE(files.MakeDirectory(kDirectory).ok());
    if (!empty) {
      ASSERT_TRUE(files.Create("/step-17/a").ok());
    }
    EXPECT_EQ(ReasonOf(pending.Publish(state.header, 2).status()),
              "CHECKPOINT_EXISTS");
  }
}

TEST(PendingStateTest, RemovesWhatWasNotPublished) {
  const TestState state = MakeState(10, 1, std::nullopt);
  CrashFileSystem files;
  {
    auto pending = *PendingState::Create(files, kDirectory);
    EXPECT_EQ(pending.path(), PendingPath(kDirectory));
    EXPECT_EQ(pending.path(), "/.step-17.pending");
    ASSERT_TRUE(WriteRank(files, pending.path(), state, 0, {}, 64).ok());
  }
  EXPECT_EQ(files.Latest(), DiskImage());
}

TEST(PendingStateTest, RemovesLeftovers) {
  const DiskImage left = {
      .files = {{"/s/.a.pending/rank-00000.data", "x"}, {"/s/b/c", "y"}},
      .directories = {"/s", "/s/.a.pending", "/s/.d.pending", "/s/b",
                      "/s/.other"}};
  CrashFileSystem files(left);
  { ASSERT_TRUE(PendingState::Create(files, "/s/a").ok()); }
  EXPECT_FALSE(files.Stat("/s/.a.pending").ok());
  EXPECT_TRUE(files.Stat("/s/.d.pending").ok());
  CrashFileSystem others(left);
  ASSERT_TRUE(RemoveLeftovers(others, "/s").ok());
  EXPECT_EQ(others.List("/s").value(),
            (std::vector<std::string>{".other", "b"}));
}

TEST(PendingStateTest, RefusesHiddenNames) {
  CrashFileSystem files;
  for (const char* directory : {"/", "/a/", "/.a", "/..", ""}) {
    EXPECT_EQ(ReasonOf(PendingState::Create(files, directory).status()),
              "INVALID_NAME");
  }
}

}  // namespace
}  // namespace gradwire
