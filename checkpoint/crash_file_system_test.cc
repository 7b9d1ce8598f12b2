// SPDX-License-Identifier: Apache-2.0
// That the model lets happen what a power loss may do, and nothing else.
#include "checkpoint/crash_file_system.h"

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace gradwire {
namespace {

using Fault = CrashFileSystem::Fault;
using Strings = std::set<std::string>;

constexpr char kAbsent[] = "(absent)";

std::string Of(const DiskImage& image, const std::string& path) {
  const auto found = image.files.find(path);
  return found == image.files.end() ? kAbsent : found->second;
}

// What a power loss now may leave of a file.
Strings Contents(const CrashFileSystem& files, const std::string& path) {
  Strings contents;
  files.ForEachPowerLoss(
      files.num_events(), 10000, 1,
      [&](const DiskImage& image) { contents.insert(Of(image, path)); });
  return contents;
}

std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : "";
}

// "/a" with `content`, all of it on the disk.
struct OneFile {
  explicit OneFile(const std::string& content)
      : files({.files = {{"/a", content}}}, 4),
        file(*files.Open("/a", FileSystem::Access::kReadWrite)) {}
  CrashFileSystem files;
  std::unique_ptr<File> file;
};

TEST(PowerLossTest, AWriteIsThereInAnyOfItsPages) {
  OneFile f("aaaabbbbcccc");
  ASSERT_TRUE(f.file->WriteAt(2, "XXXXXX").ok());
  EXPECT_EQ(Contents(f.files, "/a"), (Strings{"aaaabbbbcccc", "aaXXbbbbcccc",
                                              "aaaaXXXXcccc", "aaXXXXXXcccc"}));
  ASSERT_TRUE(f.file->Sync().ok());
  EXPECT_EQ(Contents(f.files, "/a"), Strings{"aaXXXXXXcccc"});
}

TEST(PowerLossTest, APageIsThatOfAnyWriteSince) {
  OneFile f("....");
  ASSERT_TRUE(f.file->WriteAt(0, "1").ok());
  ASSERT_TRUE(f.file->WriteAt(1, "2").ok());
  EXPECT_EQ(Contents(f.files, "/a"), (Strings{"....", "1...", "12.."}));
}

TEST(PowerLossTest, AFileMayBeLongerThanWhatIsInIt) {
  OneFile f("aa");
  ASSERT_TRUE(f.file->Append("aabb").ok());
  const std::string zero(1, '\0');
  EXPECT_EQ(
      Contents(f.files, "/a"),
      (Strings{"aa", "aa" + zero + zero + zero + zero, "aaaa" + zero + zero,
               "aa" + zero + zero + "bb", "aaaabb"}));
}

TEST(PowerLossTest, ATruncationMayCome) {
  OneFile f("aaaabb");
  ASSERT_TRUE(f.file->Truncate(2).ok());
  const Strings contents = Contents(f.files, "/a");
  EXPECT_TRUE(contents.contains("aaaabb"));
  EXPECT_TRUE(contents.contains("aa"));
  EXPECT_FALSE(contents.contains("aaaa"));
  ASSERT_TRUE(f.file->Sync().ok());
  EXPECT_EQ(Contents(f.files, "/a"), Strings{"aa"});
}

TEST(PowerLossTest, ANameIsKeptByItsDirectoryAlone) {
  CrashFileSystem files;
  auto file = files.Create("/a");
  ASSERT_TRUE((*file)->Append("x").ok());
  ASSERT_TRUE((*file)->Sync().ok());
  EXPECT_EQ(Contents(files, "/a"), (Strings{kAbsent, "x"}));
  ASSERT_TRUE(files.SyncDirectory("/").ok());
  EXPECT_EQ(Contents(files, "/a"), Strings{"x"});
}

TEST(PowerLossTest, ChangesOfNamesAreIndependent) {
  CrashFileSystem files({.files = {{"/a", "old"}}});
  ASSERT_TRUE((*files.Create("/b"))->Append("new").ok());
  ASSERT_TRUE((*files.Open("/b", FileSystem::Access::kReadWrite))->Sync().ok());
  ASSERT_TRUE(files.Rename("/b", "/a").ok());
  EXPECT_EQ(Contents(files, "/a"), (Strings{"old", "new"}));
  EXPECT_EQ(Contents(files, "/b"), (Strings{kAbsent, "new"}));
  ASSERT_TRUE(files.Remove("/a").ok());
  EXPECT_EQ(Contents(files, "/a"), (Strings{"old", "new", kAbsent}));
  ASSERT_TRUE(files.SyncDirectory("/").ok());
  EXPECT_EQ(Contents(files, "/a"), Strings{kAbsent});
}

TEST(PowerLossTest, WhatIsInALostDirectoryIsLost) {
  CrashFileSystem files;
  ASSERT_TRUE(files.MakeDirectory("/d").ok());
  auto file = files.Create("/d/a");
  ASSERT_TRUE(files.SyncDirectory("/d").ok());
  EXPECT_EQ(Contents(files, "/d/a"), (Strings{kAbsent, ""}));
  ASSERT_TRUE(files.SyncDirectory("/").ok());
  EXPECT_EQ(Contents(files, "/d/a"), Strings{""});
}

// "/p" with a file.
void MakeDirectoryWithFile(CrashFileSystem& files) {
  ASSERT_TRUE(files.MakeDirectory("/p").ok());
  auto file = *files.Create("/p/a");
  ASSERT_TRUE(file->Append("x").ok());
  ASSERT_TRUE(file->Sync().ok());
}

TEST(PowerLossTest, ADirectoryMovesWithWhatIsInIt) {
  CrashFileSystem files;
  MakeDirectoryWithFile(files);
  ASSERT_TRUE(files.SyncDirectory("/p").ok());
  ASSERT_TRUE(files.Rename("/p", "/d").ok());
  EXPECT_EQ(files.Latest(),
            (DiskImage{.files = {{"/d/a", "x"}}, .directories = {"/d"}}));
  EXPECT_EQ(Contents(files, "/d/a"), (Strings{kAbsent, "x"}));
  EXPECT_EQ(Contents(files, "/p/a"), (Strings{kAbsent, "x"}));
  ASSERT_TRUE(files.SyncDirectory("/").ok());
  EXPECT_EQ(Contents(files, "/d/a"), Strings{"x"});
  EXPECT_EQ(Contents(files, "/p/a"), Strings{kAbsent});
}

TEST(PowerLossTest, DirectoriesChangePlacesWithWhatIsInThem) {
  CrashFileSystem files;
  MakeDirectoryWithFile(files);
  ASSERT_TRUE(files.SyncDirectory("/p").ok());
  ASSERT_TRUE(files.MakeDirectory("/d").ok());
  auto file = *files.Create("/d/b");
  ASSERT_TRUE(file->Append("y").ok());
  ASSERT_TRUE(file->Sync().ok());
  ASSERT_TRUE(files.SyncDirectory("/").ok());
  ASSERT_TRUE(files.Exchange("/p", "/d").value());
  EXPECT_EQ(files.Latest(), (DiskImage{.files = {{"/d/a", "x"}, {"/p/b", "y"}},
                                       .directories = {"/d", "/p"}}));
  // Both or neither; what was not synced in one of them is still not.
  EXPECT_EQ(Contents(files, "/d/a"), (Strings{kAbsent, "x"}));
  EXPECT_EQ(Contents(files, "/p/a"), (Strings{kAbsent, "x"}));
  EXPECT_EQ(Contents(files, "/p/b"), (Strings{kAbsent, "y"}));
  EXPECT_EQ(Contents(files, "/d/b"), (Strings{kAbsent, "y"}));
  ASSERT_TRUE(files.SyncDirectory("/p").ok());
  files.ForEachPowerLoss(
      files.num_events(), 100, 1, [](const DiskImage& image) {
        EXPECT_EQ(image.files.size(), 2u);
        EXPECT_EQ(image.files.contains("/d/a"), image.files.contains("/p/b"));
      });
  ASSERT_TRUE(files.SyncDirectory("/").ok());
  EXPECT_EQ(Contents(files, "/d/a"), Strings{"x"});
  EXPECT_EQ(Contents(files, "/p/b"), Strings{"y"});
}

TEST(PowerLossTest, AMovedDirectoryMayBeEmpty) {
  CrashFileSystem files;
  MakeDirectoryWithFile(files);
  ASSERT_TRUE(files.Rename("/p", "/d").ok());
  ASSERT_TRUE(files.SyncDirectory("/").ok());
  EXPECT_EQ(Contents(files, "/d/a"), (Strings{kAbsent, "x"}));
  EXPECT_EQ(Contents(files, "/p/a"), Strings{kAbsent});
  ASSERT_TRUE(files.SyncDirectory("/d").ok());
  EXPECT_EQ(Contents(files, "/d/a"), Strings{"x"});
}

TEST(PowerLossTest, ADirectoryIsSyncedByItsNewName) {
  CrashFileSystem files;
  MakeDirectoryWithFile(files);
  ASSERT_TRUE(files.Rename("/p", "/d").ok());
  ASSERT_TRUE(files.SyncDirectory("/d").ok());
  // Either name, or neither, and never an empty directory.
  files.ForEachPowerLoss(
      files.num_events(), 100, 1, [](const DiskImage& image) {
        EXPECT_EQ(image.directories.size(), image.files.size());
        EXPECT_EQ(image.directories.contains("/d"),
                  image.files.contains("/d/a"));
      });
}

TEST(PowerLossTest, ComesAtAnyTime) {
  OneFile f("aa");
  const int64_t before = f.files.num_events();
  ASSERT_TRUE(f.file->WriteAt(0, "b").ok());
  int64_t seen = f.files.ForEachPowerLoss(
      before, 100, 1,
      [](const DiskImage& image) { EXPECT_EQ(Of(image, "/a"), "aa"); });
  EXPECT_EQ(seen, 1);
  EXPECT_EQ(Contents(f.files, "/a"), (Strings{"aa", "ba"}));
}

TEST(PowerLossTest, AFailedSyncForgetsWhatItWasToWrite) {
  OneFile f("aaaabbbb");
  ASSERT_TRUE(f.file->WriteAt(0, "XXXX").ok());
  f.files.FailAt(f.files.calls() + 1, Fault::kIoError);
  EXPECT_EQ(ReasonOf(f.file->Sync()), "STORAGE_IO");
  // Another descriptor is told that all is well.
  auto other = *f.files.Open("/a", FileSystem::Access::kReadWrite);
  ASSERT_TRUE(other->WriteAt(4, "YYYY").ok());
  ASSERT_TRUE(other->Sync().ok());
  EXPECT_EQ(Contents(f.files, "/a"), (Strings{"aaaaYYYY", "XXXXYYYY"}));
  // Written again, it is safe.
  ASSERT_TRUE(other->WriteAt(0, "XXXX").ok());
  ASSERT_TRUE(other->Sync().ok());
  EXPECT_EQ(Contents(f.files, "/a"), Strings{"XXXXYYYY"});
}

TEST(PowerLossTest, DrawsFromWhatIsTooMany) {
  OneFile f(std::string(400, 'a'));
  ASSERT_TRUE(f.file->WriteAt(0, std::string(400, 'b')).ok());
  std::set<std::string> first, second;
  bool none = false, all = false;
  const int64_t seen =
      f.files.ForEachPowerLoss(1, 500, 7, [&](const DiskImage& image) {
        first.insert(Of(image, "/a"));
        none = none || Of(image, "/a") == std::string(400, 'a');
        all = all || Of(image, "/a") == std::string(400, 'b');
      });
  EXPECT_GT(seen, 300);
  EXPECT_TRUE(none && all);
  f.files.ForEachPowerLoss(1, 500, 7, [&](const DiskImage& image) {
    second.insert(Of(image, "/a"));
  });
  EXPECT_EQ(first, second);
}

TEST(FaultTest, AKillKeepsWhatWasWrittenAndNothingMore) {
  OneFile f("a");
  ASSERT_TRUE(f.file->Append("b").ok());
  f.files.FailAt(f.files.calls() + 1, Fault::kKill);
  EXPECT_FALSE(f.file->WriteAt(2, "c").ok());
  EXPECT_TRUE(f.files.dead());
  EXPECT_FALSE(f.file->Sync().ok());
  EXPECT_FALSE(f.files.Create("/b").ok());
  EXPECT_EQ(f.files.Latest().files,
            (std::map<std::string, std::string>{{"/a", "ab"}}));
  EXPECT_EQ(Contents(f.files, "/a").size(), 3);
}

TEST(FaultTest, HappensOnceAndOnlyWhereItCan) {
  OneFile f("a");
  const int64_t next = f.files.calls() + 1;
  f.files.FailAt(next, Fault::kNoSpace);
  char out;
  EXPECT_TRUE(f.file->ReadAt(0, 1, &out).ok());
  EXPECT_EQ(f.files.faults(), 0);
  f.files.FailAt(next + 1, Fault::kNoSpace);
  EXPECT_EQ(ReasonOf(f.file->WriteAt(1, "b")), "STORAGE_FULL");
  EXPECT_EQ(f.files.faults(), 1);
  EXPECT_TRUE(f.file->WriteAt(1, "b").ok());
}

TEST(FaultTest, AShortWriteWritesHalf) {
  OneFile f("");
  f.files.FailAt(f.files.calls() + 1, Fault::kShortWrite);
  EXPECT_EQ(ReasonOf(f.file->WriteAt(0, "1234")), "STORAGE_FULL");
  EXPECT_EQ(Of(f.files.Latest(), "/a"), "12");
  EXPECT_TRUE(f.file->WriteAt(0, "1234").ok());
}

TEST(LieTest, ASyncThatIsNoneKeepsNothing) {
  OneFile f("a");
  f.files.TellLie(CrashFileSystem::Lie::kSync);
  ASSERT_TRUE(f.file->WriteAt(0, "b").ok());
  ASSERT_TRUE(f.file->Sync().ok());
  EXPECT_EQ(Contents(f.files, "/a"), (Strings{"a", "b"}));
}

TEST(LieTest, SyncsUpToARenamingAreNone) {
  OneFile f("a");
  f.files.TellLie(CrashFileSystem::Lie::kSyncBeforeRename);
  ASSERT_TRUE(f.file->WriteAt(0, "b").ok());
  ASSERT_TRUE(f.file->Sync().ok());
  ASSERT_TRUE(f.files.Rename("/a", "/c").ok());
  ASSERT_TRUE(f.files.SyncDirectory("/").ok());
  EXPECT_EQ(Contents(f.files, "/c"), (Strings{"a", "b"}));
  ASSERT_TRUE(f.file->Sync().ok());
  EXPECT_EQ(Contents(f.files, "/c"), Strings{"b"});
}

}  // namespace
}  // namespace gradwire
