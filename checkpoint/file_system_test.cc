// SPDX-License-Identifier: Apache-2.0
// One suite for every implementation of FileSystem, then what is common to
// them.
#include "checkpoint/file_system.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "checkpoint/crash_file_system.h"

namespace {

// What this program has called, in the C library's place.
int fsyncs = 0, fdatasyncs = 0;

}  // namespace

int fsync(int fd) {
  ++fsyncs;
  return static_cast<int>(syscall(SYS_fsync, fd));
}

int fdatasync(int fd) {
  ++fdatasyncs;
  return static_cast<int>(syscall(SYS_fdatasync, fd));
}

namespace gradwire {
namespace {

using Access = FileSystem::Access;

std::string ReasonOf(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : "";
}

std::string ReadAll(File& file) {
  std::string content(1000, '?');
  const auto got = file.ReadAt(0, 1000, content.data());
  EXPECT_TRUE(got.ok()) << got.status();
  content.resize(static_cast<size_t>(got.value_or(0)));
  return content;
}

class FileSystemTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (GetParam() == "posix") {
      root_ = testing::TempDir() + "/file_system_test." +
              testing::UnitTest::GetInstance()->current_test_info()->name();
      root_ = root_.substr(0, root_.find('/', testing::TempDir().size() + 1));
      std::filesystem::remove_all(root_);
      files_ = &PosixFileSystem();
    } else {
      root_ = "/root";
      owned_ = std::make_unique<CrashFileSystem>();
      files_ = owned_.get();
    }
    ASSERT_TRUE(files_->MakeDirectory(root_).ok());
  }
  void TearDown() override {
    if (owned_ == nullptr) std::filesystem::remove_all(root_);
  }
  std::string In(const std::string& name) const { return root_ + "/" + name; }
  std::unique_ptr<File> Create(const std::string& name) {
    auto file = files_->Create(In(name));
    EXPECT_TRUE(file.ok()) << file.status();
    return *std::move(file);
  }

  std::string root_;
  std::unique_ptr<FileSystem> owned_;
  FileSystem* files_ = nullptr;
};

TEST_P(FileSystemTest, ReadsWhatWasWritten) {
  auto file = Create("a");
  EXPECT_TRUE(file->Append("0123456789").ok());
  EXPECT_TRUE(file->WriteAt(3, "xyz").ok());
  EXPECT_TRUE(file->Append("end").ok());
  EXPECT_EQ(ReadAll(*file), "012xyz6789end");
  file->StartWriteBack(0, 13);
  EXPECT_TRUE(file->Sync().ok());
  EXPECT_TRUE(file->SyncAll().ok());
  auto again = files_->Open(In("a"), Access::kRead);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(ReadAll(**again), "012xyz6789end");
  EXPECT_EQ((*again)->Size().value(), 13);
  EXPECT_EQ((*again)->path(), In("a"));
}

TEST_P(FileSystemTest, ReadsFewerBytesOnlyAtTheEnd) {
  auto file = Create("a");
  ASSERT_TRUE(file->Append("0123456789").ok());
  char out[8] = {};
  EXPECT_EQ(file->ReadAt(6, 8, out).value(), 4);
  EXPECT_EQ(std::string(out, 4), "6789");
  EXPECT_EQ(file->ReadAt(10, 8, out).value(), 0);
  EXPECT_EQ(file->ReadAt(99, 8, out).value(), 0);
}

TEST_P(FileSystemTest, TruncatesAndExtendsWithZeros) {
  auto file = Create("a");
  ASSERT_TRUE(file->Append("0123456789").ok());
  EXPECT_TRUE(file->Truncate(4).ok());
  EXPECT_EQ(ReadAll(*file), "0123");
  EXPECT_TRUE(file->Truncate(6).ok());
  EXPECT_TRUE(file->WriteAt(8, "8").ok());
  EXPECT_EQ(ReadAll(*file), std::string("0123\0\0\0\0008", 9));
}

TEST_P(FileSystemTest, CreatesOnlyWhatIsNotThere) {
  Create("a");
  const auto again = files_->Create(In("a"));
  EXPECT_EQ(again.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(ReasonOf(again.status()), "FILE_EXISTS");
  const auto nowhere = files_->Create(In("b/c"));
  EXPECT_EQ(nowhere.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReasonOf(files_->MakeDirectory(root_)), "FILE_EXISTS");
}

TEST_P(FileSystemTest, SaysWhatIsNotFound) {
  const auto open = files_->Open(In("a"), Access::kReadWrite);
  EXPECT_EQ(open.status().code(), absl::StatusCode::kNotFound);
  const ErrorDetail detail = GetErrorDetail(open.status()).value();
  EXPECT_EQ(detail.reason, "FILE_NOT_FOUND");
  EXPECT_EQ(detail.metadata.at("path"), In("a"));
  EXPECT_EQ(detail.metadata.at("operation"), "open a file");
  EXPECT_EQ(detail.metadata.at("errno"), std::to_string(ENOENT));
  EXPECT_EQ(ReasonOf(files_->Remove(In("a"))), "FILE_NOT_FOUND");
  EXPECT_EQ(ReasonOf(files_->Rename(In("a"), In("b"))), "FILE_NOT_FOUND");
  EXPECT_EQ(ReasonOf(files_->List(In("a")).status()), "FILE_NOT_FOUND");
  EXPECT_EQ(ReasonOf(files_->SyncDirectory(In("a"))), "FILE_NOT_FOUND");
  EXPECT_EQ(ReasonOf(files_->Stat(In("a")).status()), "FILE_NOT_FOUND");
}

TEST_P(FileSystemTest, ListsRenamesAndRemoves) {
  ASSERT_TRUE(Create("b")->Append("of b").ok());
  ASSERT_TRUE(Create("a")->Append("of a").ok());
  EXPECT_EQ(files_->List(root_).value(), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(files_->Rename(In("b"), In("a")).ok());
  EXPECT_EQ(files_->List(root_).value(), std::vector<std::string>{"a"});
  EXPECT_TRUE(files_->SyncDirectory(root_).ok());
  EXPECT_EQ(ReadAll(**files_->Open(In("a"), Access::kRead)), "of b");
  EXPECT_EQ(files_->Stat(In("a"))->bytes, 4);
  EXPECT_FALSE(files_->Stat(In("a"))->is_directory);
  EXPECT_TRUE(files_->Stat(root_)->is_directory);
  EXPECT_EQ(ReasonOf(files_->Remove(root_)), "FILE_EXISTS");
  EXPECT_TRUE(files_->Remove(In("a")).ok());
  EXPECT_TRUE(files_->MakeDirectory(In("c")).ok());
  EXPECT_TRUE(files_->Remove(In("c")).ok());
  EXPECT_TRUE(files_->List(root_)->empty());
}

TEST_P(FileSystemTest, TwoDirectoriesChangePlaces) {
  for (const char* name : {"one", "other"}) {
    ASSERT_TRUE(files_->MakeDirectory(In(name)).ok());
  }
  ASSERT_TRUE(Create("one/a")->Append("of one").ok());
  ASSERT_TRUE(Create("other/b")->Append("of other").ok());
  EXPECT_EQ(files_->Exchange(In("one"), In("other")).value(), true);
  EXPECT_EQ(files_->List(In("one")).value(), std::vector<std::string>{"b"});
  EXPECT_EQ(ReadAll(**files_->Open(In("other/a"), Access::kRead)), "of one");
  EXPECT_EQ(ReasonOf(files_->Exchange(In("one"), In("none")).status()),
            "FILE_NOT_FOUND");
  EXPECT_EQ(ReasonOf(files_->Exchange(In("none"), In("one")).status()),
            "FILE_NOT_FOUND");
  EXPECT_EQ(files_->List(root_).value(),
            (std::vector<std::string>{"one", "other"}));
  for (const char* name : {"one", "other"}) {
    EXPECT_TRUE(RemoveDirectory(*files_, In(name)).ok());
  }
}

TEST_P(FileSystemTest, AFileHasTwoNames) {
  ASSERT_TRUE(Create("a")->Append("of a").ok());
  EXPECT_EQ(files_->Link(In("a"), In("b")).value(), true);
  ASSERT_TRUE(files_->Remove(In("a")).ok());
  EXPECT_EQ(ReadAll(**files_->Open(In("b"), Access::kRead)), "of a");
  EXPECT_EQ(ReasonOf(files_->Link(In("a"), In("c")).status()),
            "FILE_NOT_FOUND");
  EXPECT_EQ(ReasonOf(files_->Link(In("b"), In("b")).status()), "FILE_EXISTS");
  ASSERT_TRUE(files_->MakeDirectory(In("d")).ok());
  // Of directories there is one name.
  EXPECT_EQ(files_->Link(In("d"), In("e")).value(), false);
  EXPECT_TRUE(files_->Remove(In("b")).ok());
  EXPECT_TRUE(files_->Remove(In("d")).ok());
}

TEST_P(FileSystemTest, ADirectoryMovesToNoNameOrToThatOfAnEmptyOne) {
  for (const char* name : {"moved", "empty", "full"}) {
    ASSERT_TRUE(files_->MakeDirectory(In(name)).ok());
  }
  ASSERT_TRUE(Create("moved/a")->Append("of a").ok());
  ASSERT_TRUE(Create("full/b") != nullptr);
  ASSERT_TRUE(Create("file") != nullptr);
  EXPECT_EQ(ReasonOf(files_->Rename(In("moved"), In("full"))), "FILE_EXISTS");
  EXPECT_FALSE(files_->Rename(In("moved"), In("file")).ok());
  EXPECT_FALSE(files_->Rename(In("file"), In("empty")).ok());
  EXPECT_TRUE(files_->Rename(In("moved"), In("empty")).ok());
  EXPECT_TRUE(files_->Rename(In("empty"), In("new")).ok());
  EXPECT_EQ(files_->List(root_).value(),
            (std::vector<std::string>{"file", "full", "new"}));
  EXPECT_EQ(ReadAll(**files_->Open(In("new/a"), Access::kRead)), "of a");
  ASSERT_TRUE(files_->Remove(In("new/a")).ok());
  ASSERT_TRUE(files_->Remove(In("full/b")).ok());
  for (const char* name : {"new", "full", "file"}) {
    EXPECT_TRUE(files_->Remove(In(name)).ok());
  }
}

TEST_P(FileSystemTest, MakesAllDirectoriesOfAPath) {
  EXPECT_TRUE(MakeDirectories(*files_, In("a/b/c")).ok());
  Create("a/b/c/file");
  EXPECT_TRUE(MakeDirectories(*files_, In("a/b/c")).ok());
  EXPECT_TRUE(MakeDirectories(*files_, In("a/b/d")).ok());
  EXPECT_EQ(files_->List(In("a/b")).value(),
            (std::vector<std::string>{"c", "d"}));
  EXPECT_FALSE(MakeDirectories(*files_, In("a/b/c/file")).ok());
  EXPECT_FALSE(MakeDirectories(*files_, In("a/b/c/file/e")).ok());
}

TEST_P(FileSystemTest, AnOpenFileOutlivesItsName) {
  auto file = Create("a");
  ASSERT_TRUE(file->Append("still").ok());
  ASSERT_TRUE(files_->Remove(In("a")).ok());
  EXPECT_TRUE(file->Append(" here").ok());
  EXPECT_EQ(ReadAll(*file), "still here");
}

INSTANTIATE_TEST_SUITE_P(All, FileSystemTest, testing::Values("posix", "crash"),
                         [](const auto& info) { return info.param; });

TEST(PosixFileSystemTest, FilesAreTheOwnersAlone) {
  const std::string root = testing::TempDir() + "/owners_alone";
  std::filesystem::remove_all(root);
  ASSERT_TRUE(PosixFileSystem().MakeDirectory(root).ok());
  ASSERT_TRUE(PosixFileSystem().Create(root + "/a").ok());
  const auto others =
      std::filesystem::perms::group_all | std::filesystem::perms::others_all;
  for (const std::string& path : {root, root + "/a"}) {
    const auto permissions = std::filesystem::status(path).permissions();
    EXPECT_EQ(permissions & others, std::filesystem::perms::none) << path;
  }
  EXPECT_GT(PosixFileSystem().FreeBytes(root).value(), 0);
  std::filesystem::remove_all(root);
}

TEST(PosixFileSystemTest, EverySyncIsTheSystems) {
  const std::string root = testing::TempDir() + "/every_sync";
  std::filesystem::remove_all(root);
  FileSystem& files = PosixFileSystem();
  ASSERT_TRUE(files.MakeDirectory(root).ok());
  const auto file = files.Create(root + "/a").value();
  ASSERT_TRUE(file->Append("a").ok());
  fsyncs = fdatasyncs = 0;
  ASSERT_TRUE(file->Sync().ok());
  EXPECT_EQ(std::pair(fdatasyncs, fsyncs), std::pair(1, 0));
  ASSERT_TRUE(file->SyncAll().ok());
  EXPECT_EQ(std::pair(fdatasyncs, fsyncs), std::pair(1, 1));
  ASSERT_TRUE(files.SyncDirectory(root).ok());
  EXPECT_EQ(std::pair(fdatasyncs, fsyncs), std::pair(1, 2));
  std::filesystem::remove_all(root);
}

TEST(PosixFileSystemTest, LinksAreNotFollowed) {
  const std::string link = testing::TempDir() + "/a_link";
  std::filesystem::remove(link);
  std::filesystem::create_symlink("/etc/hostname", link);
  EXPECT_FALSE(PosixFileSystem().Open(link, Access::kRead).ok());
  std::filesystem::remove(link);
}

// A file whose calls answer what the test says, one after the other.
class ScriptedFile : public File {
 public:
  explicit ScriptedFile(std::vector<int64_t> answers)
      : File("/scripted"), answers_(std::move(answers)) {}
  std::string written;
  int calls = 0;

 protected:
  int64_t CallWrite(int64_t offset, std::string_view bytes) override {
    EXPECT_EQ(offset, static_cast<int64_t>(written.size()));
    const int64_t answer = Next();
    if (answer > 0) written += bytes.substr(0, static_cast<size_t>(answer));
    return answer;
  }
  int64_t CallRead(int64_t, int64_t, char*) override { return Next(); }
  int CallSync(bool) override { return static_cast<int>(Next()); }
  void CallStartWriteBack(int64_t, int64_t) override {}
  int CallTruncate(int64_t) override { return static_cast<int>(Next()); }
  int64_t CallSize() override { return Next(); }
  int64_t CallFreeBytes() override { return 77; }

 private:
  int64_t Next() { return answers_.at(static_cast<size_t>(calls++)); }
  const std::vector<int64_t> answers_;
};

TEST(FileTest, GoesOnAfterShortAndInterruptedCalls) {
  ScriptedFile file({-EINTR, 2, 1, -EINTR, 4});
  EXPECT_TRUE(file.WriteAt(0, "1234567").ok());
  EXPECT_EQ(file.written, "1234567");
  ScriptedFile reading({-EINTR, 2, 3, 0});
  char out[9];
  EXPECT_EQ(reading.ReadAt(0, 9, out).value(), 5);
  ScriptedFile syncing({-EINTR, 0});
  EXPECT_TRUE(syncing.Sync().ok());
}

TEST(FileTest, AFullDiskSaysWhatIsNeededAndWhatIsFree) {
  for (const int error : {ENOSPC, EDQUOT}) {
    ScriptedFile file({3, -error});
    const absl::Status status = file.WriteAt(0, "1234567");
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    const ErrorDetail detail = GetErrorDetail(status).value();
    EXPECT_EQ(detail.reason, "STORAGE_FULL");
    EXPECT_EQ(detail.category, ErrorCategory::kServer);
    EXPECT_EQ(detail.metadata.at("needed"), "4");
    EXPECT_EQ(detail.metadata.at("free"), "77");
    EXPECT_EQ(detail.metadata.at("path"), "/scripted");
    EXPECT_EQ(detail.metadata.at("operation"), "write");
  }
}

TEST(FileTest, OtherFailuresHaveTheirReason) {
  for (const int error : {EMFILE, ENFILE, ENOMEM, EAGAIN}) {
    ScriptedFile file({-error});
    EXPECT_EQ(ReasonOf(file.Size().status()), "SYSTEM_LIMIT");
  }
  for (const int error : {EIO, EROFS, EBADF}) {
    ScriptedFile file({-error});
    const absl::Status status = file.Truncate(1);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ(ReasonOf(status), "STORAGE_IO");
  }
  // A write that writes nothing is not tried for ever.
  ScriptedFile file({0});
  EXPECT_EQ(ReasonOf(file.WriteAt(0, "1")), "STORAGE_IO");
}

TEST(FileTest, AFailedSyncIsFinal) {
  ScriptedFile file({4, -EIO});
  ASSERT_TRUE(file.WriteAt(0, "1234").ok());
  const absl::Status failed = file.Sync();
  EXPECT_EQ(ReasonOf(failed), "STORAGE_IO");
  EXPECT_EQ(file.Sync(), failed);
  EXPECT_EQ(file.SyncAll(), failed);
  EXPECT_EQ(file.WriteAt(4, "5"), failed);
  EXPECT_EQ(file.Truncate(0), failed);
  // None of them reached the system.
  EXPECT_EQ(file.calls, 2);
}

TEST(FileTest, AFailedWriteIsNot) {
  ScriptedFile file({-ENOSPC, 0, 2, 0});
  EXPECT_FALSE(file.WriteAt(0, "12").ok());
  EXPECT_TRUE(file.Truncate(0).ok());
  EXPECT_TRUE(file.WriteAt(0, "12").ok());
  EXPECT_TRUE(file.Sync().ok());
}

TEST(FileSystemPathTest, DirectoryOf) {
  EXPECT_EQ(DirectoryOf("/a/b"), "/a");
  EXPECT_EQ(DirectoryOf("/a"), "/");
  EXPECT_EQ(DirectoryOf("a"), ".");
}

}  // namespace
}  // namespace gradwire
