// SPDX-License-Identifier: Apache-2.0
#include "server/metadata/metadata.h"

#include <sqlite3.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "base/error.h"
#include "gtest/gtest.h"

namespace {

// Of this program, SQLite included.
int syncs = 0;

}  // namespace

// In the C library's place.
int fsync(int fd) {
  ++syncs;
  return static_cast<int>(syscall(SYS_fsync, fd));
}

int fdatasync(int fd) {
  ++syncs;
  return static_cast<int>(syscall(SYS_fdatasync, fd));
}

namespace gradwire {
namespace {

class MetadataTest : public testing::Test {
 protected:
  MetadataTest() {
    char folder[] = "/tmp/metadata-XXXXXX";
    folder_ = mkdtemp(folder);
  }
  ~MetadataTest() override { std::filesystem::remove_all(folder_); }

  std::string path() const { return folder_ + "/gradwire.db"; }
  std::unique_ptr<Metadata> Open() const {
    auto metadata = Metadata::Open(path());
    EXPECT_TRUE(metadata.ok()) << metadata.status();
    return *std::move(metadata);
  }
  void Execute(const char* sql) const {
    sqlite3* handle = nullptr;
    ASSERT_EQ(sqlite3_open(path().c_str(), &handle), SQLITE_OK);
    EXPECT_EQ(sqlite3_exec(handle, sql, nullptr, nullptr, nullptr), SQLITE_OK);
    sqlite3_close(handle);
  }

 private:
  std::string folder_;
};

std::string Reason(const absl::Status& status) {
  return GetErrorDetail(status).value_or(ErrorDetail()).reason;
}

JobRow Row(const std::string& id) {
  JobRow row;
  row.job_id = id;
  row.spec = std::string("spec\0of ", 8) + id;
  row.created_microseconds = 1234567;
  return row;
}

HandleRow HandleOf(int64_t number, const std::string& model_id) {
  HandleRow row;
  row.number = number;
  row.model_id = model_id;
  return row;
}

TEST_F(MetadataTest, EveryOpeningTakesAHigherEpoch) {
  EXPECT_EQ(Open()->epoch(), 1);
  EXPECT_EQ(Open()->epoch(), 2);
  EXPECT_EQ(Open()->epoch(), 3);
}

TEST_F(MetadataTest, ALostLeaseWritesNothing) {
  const auto old = Open();
  ASSERT_TRUE(old->AddJob(Row("a")).ok());
  const auto current = Open();
  const absl::Status fenced = old->AddJob(Row("b"));
  EXPECT_EQ(Reason(fenced), "EPOCH_FENCED");
  EXPECT_EQ(GetErrorDetail(fenced)->metadata.at("epoch"), "1");
  EXPECT_EQ(GetErrorDetail(fenced)->metadata.at("highest"), "2");
  EXPECT_EQ(Reason(old->SetWatermark("a", 5)), "EPOCH_FENCED");
  const auto jobs = current->Jobs();
  ASSERT_EQ(jobs->size(), 1u);
  EXPECT_EQ(jobs->at(0).log_watermark, 0);
}

// The database says up to where a log is to be believed: so it must not fall
// behind by a power loss.
TEST_F(MetadataTest, EveryTransactionIsSynced) {
  const auto metadata = Open();
  ASSERT_TRUE(metadata->AddJob(Row("a")).ok());
  for (int64_t watermark = 1; watermark < 5; ++watermark) {
    const int before = syncs;
    ASSERT_TRUE(metadata->SetWatermark("a", watermark).ok());
    EXPECT_GT(syncs, before) << watermark;
  }
}

TEST_F(MetadataTest, JobsComeBackAsTheyWere) {
  {
    const auto metadata = Open();
    ASSERT_TRUE(metadata->AddJob(Row("b")).ok());
    ASSERT_TRUE(metadata->AddJob(Row("a")).ok());
    ASSERT_TRUE(metadata->AddJob(Row("never")).ok());
    ASSERT_TRUE(metadata->ForgetJob("never").ok());
    ASSERT_TRUE(metadata->SetProfile("a", "profile").ok());
    ASSERT_TRUE(metadata->SetWatermark("a", 77).ok());
    ASSERT_TRUE(metadata->SetJobState("b", JobRow::kFailed, "why").ok());
    EXPECT_FALSE(metadata->AddJob(Row("a")).ok()) << "its name is taken";
  }
  const auto jobs = Open()->Jobs();
  ASSERT_EQ(jobs->size(), 2u);
  EXPECT_EQ(jobs->at(0).job_id, "b") << "oldest first";
  EXPECT_EQ(jobs->at(0).state, JobRow::kFailed);
  EXPECT_EQ(jobs->at(0).error, "why");
  EXPECT_EQ(jobs->at(1).job_id, "a");
  EXPECT_EQ(jobs->at(1).spec, Row("a").spec) << "with its zero byte";
  EXPECT_EQ(jobs->at(1).created_microseconds, 1234567);
  EXPECT_EQ(jobs->at(1).state, JobRow::kLive);
  EXPECT_EQ(jobs->at(1).profile, "profile");
  EXPECT_EQ(jobs->at(1).log_watermark, 77);
}

TEST_F(MetadataTest, OfADeletedJobNothingStaysButItsName) {
  const auto metadata = Open();
  for (const char* id : {"a", "b"}) {
    ASSERT_TRUE(metadata->AddJob(Row(id)).ok());
    ASSERT_TRUE(metadata->AddHandle(id, HandleOf(1, "m")).ok());
    const RecoveryPoint point = {1, 10, 3, 4};
    Metadata::Reference reference;
    reference.operations = {{1, 1, "x"}};
    reference.point = &point;
    ASSERT_TRUE(metadata->AddReference(id, reference).ok());
  }
  ASSERT_TRUE(metadata->SetJobState("a", JobRow::kDeleted, "").ok());
  EXPECT_EQ(metadata->Jobs()->at(0).state, JobRow::kDeleted);
  EXPECT_TRUE(metadata->Handles("a")->empty());
  EXPECT_TRUE(metadata->Operations("a")->empty());
  EXPECT_TRUE(metadata->Points("a")->empty());
  ASSERT_TRUE(metadata->SetJobState("a", JobRow::kFailed, "late").ok());
  EXPECT_EQ(metadata->Jobs()->at(0).state, JobRow::kDeleted);
  EXPECT_EQ(metadata->Handles("b")->size(), 1u);
  EXPECT_EQ(metadata->Operations("b")->size(), 1u);
  EXPECT_EQ(metadata->Points("b")->size(), 1u);
}

TEST_F(MetadataTest, HandlesAndSessions) {
  {
    const auto metadata = Open();
    ASSERT_TRUE(metadata->AddSession("s").ok());
    ASSERT_TRUE(metadata->AddSession("t").ok());
    ASSERT_TRUE(metadata->FinishSession("s").ok());
    ASSERT_TRUE(metadata
                    ->AddHandle("a", {.number = 2,
                                      .model_id = "m2",
                                      .session_id = "t",
                                      .request = "r",
                                      .attached = true})
                    .ok());
    ASSERT_TRUE(metadata->AddHandle("a", HandleOf(1, "m1")).ok());
    ASSERT_TRUE(metadata->FenceHandles("a").ok());
    ASSERT_TRUE(metadata->AddHandle("a", HandleOf(3, "m3")).ok());
    Metadata::Reference reference;
    reference.closed = {{3, 9}};
    ASSERT_TRUE(metadata->AddReference("a", reference).ok());
  }
  const auto metadata = Open();
  const auto sessions = metadata->Sessions();
  ASSERT_EQ(sessions->size(), 2u);
  EXPECT_TRUE(sessions->at(0).finished);
  EXPECT_FALSE(sessions->at(1).finished);
  const auto handles = metadata->Handles("a");
  ASSERT_EQ(handles->size(), 3u);
  EXPECT_EQ(handles->at(0).model_id, "m1") << "in the order of attaching";
  EXPECT_TRUE(handles->at(0).fenced);
  EXPECT_EQ(handles->at(1).session_id, "t");
  EXPECT_EQ(handles->at(1).request, "r");
  EXPECT_TRUE(handles->at(1).attached);
  EXPECT_FALSE(handles->at(2).fenced);
  EXPECT_EQ(handles->at(2).closed_below, 9);
}

TEST_F(MetadataTest, AReferenceIsTakenAsAWhole) {
  const auto metadata = Open();
  ASSERT_TRUE(metadata->AddJob(Row("a")).ok());
  const RecoveryPoint first = {1, 10, 3, 4}, second = {2, 20, 5, 6};
  Metadata::Reference reference;
  reference.operations = {{1, 2, "two"}, {1, 1, "one"}};
  reference.point = &first;
  reference.oldest_point = 1;
  reference.log_begin = 8;
  ASSERT_TRUE(metadata->AddReference("a", reference).ok());
  reference.operations = {{1, 3, "three"}};
  // Its number is taken: nothing of it may stay.
  reference.log_begin = 18;
  ASSERT_FALSE(metadata->AddReference("a", reference).ok());
  EXPECT_EQ(metadata->Operations("a")->size(), 2u);
  EXPECT_EQ(metadata->Jobs()->at(0).log_begin, 8);
  reference.point = &second;
  reference.oldest_point = 2;
  ASSERT_TRUE(metadata->AddReference("a", reference).ok());
  const auto points = metadata->Points("a");
  ASSERT_EQ(points->size(), 1u) << "the first was let go";
  EXPECT_EQ(points->at(0).number, 2);
  EXPECT_EQ(points->at(0).replay_from, 20);
  EXPECT_EQ(points->at(0).optimizer_step, 5);
  EXPECT_EQ(points->at(0).weight_version, 6);
  const auto operations = metadata->Operations("a");
  ASSERT_EQ(operations->size(), 3u);
  EXPECT_EQ(operations->at(0).outcome, "one");
  EXPECT_EQ(metadata->Jobs()->at(0).log_begin, 18);
}

TEST_F(MetadataTest, ANewerSchemaIsRefused) {
  Open().reset();
  Execute("PRAGMA user_version=99");
  const auto metadata = Metadata::Open(path());
  EXPECT_EQ(Reason(metadata.status()), "STATE_VERSION");
  EXPECT_EQ(GetErrorDetail(metadata.status())->metadata.at("have"), "99");
}

TEST_F(MetadataTest, AFileThatIsNoneIsDamaged) {
  FILE* file = fopen(path().c_str(), "w");
  for (int i = 0; i < 1000; ++i) fputs("this is no database", file);
  fclose(file);
  EXPECT_EQ(Reason(Metadata::Open(path()).status()), "METADATA_CORRUPT");
}

}  // namespace
}  // namespace gradwire
