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
  // The file is from a backup, and there was a fourth.
  EXPECT_EQ((*Metadata::Open(path(), 4))->epoch(), 5);
  EXPECT_EQ((*Metadata::Open(path(), 4))->epoch(), 6);
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

TEST_F(MetadataTest, WhatKernelsDecideIsKeptForEachRankUntilTheJobGoes) {
  {
    const auto metadata = Open();
    ASSERT_TRUE(metadata->AddJob(Row("a")).ok());
    ASSERT_TRUE(metadata->AddJob(Row("b")).ok());
    const std::string bytes("\0first", 6);
    ASSERT_TRUE(metadata->AddChoices("a", {{1, bytes}, {0, "zero"}}).ok());
    ASSERT_TRUE(metadata->AddChoices("b", {{0, "of b"}}).ok());
    ASSERT_TRUE(metadata->AddChoices("a", {{1, "second"}}).ok());
    EXPECT_TRUE(metadata->Choices("none")->empty());
    const auto rows = *metadata->Choices("a");
    ASSERT_EQ(rows.size(), 3u);
    EXPECT_EQ(rows[0].rank, 1);
    EXPECT_EQ(rows[0].choices, bytes);
    EXPECT_EQ(rows[1].rank, 0);
    EXPECT_EQ(rows[2].choices, "second");
  }
  const auto metadata = Open();
  ASSERT_TRUE(metadata->SetJobState("a", JobRow::kFailed, "").ok());
  EXPECT_EQ(metadata->Choices("a")->size(), 3u);
  ASSERT_TRUE(metadata->SetJobState("a", JobRow::kDeleted, "").ok());
  EXPECT_TRUE(metadata->Choices("a")->empty());
  // A rank that has not heard of it.
  ASSERT_TRUE(metadata->AddChoices("a", {{0, "late"}}).ok());
  EXPECT_TRUE(metadata->Choices("a")->empty());
  EXPECT_EQ(metadata->Choices("b")->size(), 1u);
  ASSERT_TRUE(metadata->ForgetJob("b").ok());
  EXPECT_TRUE(metadata->Choices("b")->empty());
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

CheckpointRow CheckpointOf(const std::string& name, const std::string& digest,
                           int64_t created) {
  CheckpointRow row;
  row.path = "jobs/a/checkpoints/" + name;
  row.digest = digest;
  row.kind = "training";
  row.created_microseconds = created;
  row.expires_microseconds = created + 10;
  return row;
}

TEST_F(MetadataTest, ACheckpointKeepsItsTimes) {
  {
    const auto metadata = Open();
    ASSERT_TRUE(metadata->AddCheckpoint(CheckpointOf("one", "d1", 100)).ok());
    // Found again: it is the same one.
    ASSERT_TRUE(metadata->LearnCheckpoint(CheckpointOf("one", "d1", 900)).ok());
  }
  const auto metadata = Open();
  auto row = *metadata->FindCheckpoint("jobs/a/checkpoints/one");
  ASSERT_TRUE(row.has_value());
  EXPECT_EQ(row->digest, "d1");
  EXPECT_EQ(row->kind, "training");
  EXPECT_FALSE(row->promotable);
  EXPECT_EQ(row->created_microseconds, 100);
  EXPECT_EQ(row->expires_microseconds, 110);
  row->expires_microseconds = 0;
  row->promotable = true;
  ASSERT_TRUE(metadata->PutCheckpoint(*row).ok());
  row = *metadata->FindCheckpoint("jobs/a/checkpoints/one");
  EXPECT_EQ(row->expires_microseconds, 0);
  EXPECT_TRUE(row->promotable);
  // One that is equal has taken its name: it is as new as any.
  ASSERT_TRUE(metadata->AddCheckpoint(CheckpointOf("one", "d1", 200)).ok());
  row = *metadata->FindCheckpoint("jobs/a/checkpoints/one");
  EXPECT_EQ(row->created_microseconds, 200);
  EXPECT_EQ(row->expires_microseconds, 210);
  // And another one, of which nobody has told, and which is older.
  ASSERT_TRUE(metadata->LearnCheckpoint(CheckpointOf("one", "d2", 50)).ok());
  row = *metadata->FindCheckpoint("jobs/a/checkpoints/one");
  EXPECT_EQ(row->digest, "d2");
  EXPECT_EQ(row->expires_microseconds, 60);
  // What is said of the one before is of no more use.
  EXPECT_FALSE(*metadata->ChangeCheckpoint(CheckpointOf("one", "d1", 7)));
  ASSERT_TRUE(metadata->ForgetCheckpoint(row->path, "d1").ok());
  EXPECT_EQ((*metadata->FindCheckpoint(row->path))->created_microseconds, 50);
  EXPECT_TRUE(*metadata->ChangeCheckpoint(CheckpointOf("one", "d2", 8)));
  EXPECT_EQ((*metadata->FindCheckpoint(row->path))->created_microseconds, 8);
  EXPECT_EQ(metadata->Checkpoints()->size(), 1u);
  ASSERT_TRUE(metadata->ForgetCheckpoint(row->path, "d2").ok());
  EXPECT_FALSE(metadata->FindCheckpoint(row->path)->has_value());
}

// The newest one is what a job is resumed from.
TEST_F(MetadataTest, AClockThatGoesBackMakesNoOlderCheckpoint) {
  const auto metadata = Open();
  ASSERT_TRUE(metadata->AddCheckpoint(CheckpointOf("one", "d1", 500)).ok());
  ASSERT_TRUE(metadata->AddCheckpoint(CheckpointOf("two", "d2", 400)).ok());
  CheckpointRow other = CheckpointOf("three", "d3", 400);
  other.path = "jobs/b/snapshots/three";
  ASSERT_TRUE(metadata->AddCheckpoint(other).ok());
  const auto two = *metadata->FindCheckpoint("jobs/a/checkpoints/two");
  EXPECT_EQ(two->created_microseconds, 501);
  EXPECT_EQ(two->expires_microseconds, 511) << "its time to live stays";
  EXPECT_EQ((*metadata->FindCheckpoint(other.path))->created_microseconds, 400)
      << "of another job";
}

TEST_F(MetadataTest, RemovalsStayUntilTheyHaveEnded) {
  {
    const auto metadata = Open();
    ASSERT_TRUE(metadata->AddRemoval({"jobs/a/snapshots/b", "d1"}).ok());
    ASSERT_TRUE(metadata->AddRemoval({"jobs/a/snapshots/a", "d2"}).ok());
    ASSERT_TRUE(metadata->AddRemoval({"jobs/a/snapshots/a", "d3"}).ok());
  }
  const auto metadata = Open();
  const auto rows = metadata->Removals();
  ASSERT_EQ(rows->size(), 3u);
  EXPECT_EQ(rows->at(0).path, "jobs/a/snapshots/a");
  EXPECT_EQ(rows->at(0).digest, "d2");
  EXPECT_EQ(rows->at(1).digest, "d3");
  EXPECT_EQ(rows->at(2).digest, "d1");
  ASSERT_TRUE(metadata->EndRemoval({"jobs/a/snapshots/a", "d4"}).ok());
  EXPECT_EQ(metadata->Removals()->size(), 3u) << "of another digest";
  ASSERT_TRUE(metadata->EndRemoval({"jobs/a/snapshots/a", "d3"}).ok());
  EXPECT_EQ(metadata->Removals()->size(), 2u);
}

TEST_F(MetadataTest, WhatIsReplacedIsToGoFromAStore) {
  const auto metadata = Open();
  CheckpointRow snapshot = CheckpointOf("snapshot", "d1", 100);
  snapshot.kind = "base";
  const auto add = [&](const std::string& name, const std::string& digest) {
    ASSERT_TRUE(metadata->AddCheckpoint(CheckpointOf(name, digest, 100)).ok());
  };
  add("one", "d1");
  add("one", "d2");
  EXPECT_TRUE(metadata->Removals()->empty()) << "there is no store";
  metadata->RememberReplaced();
  add("two", "d1");
  add("two", "d1");
  ASSERT_TRUE(metadata->AddCheckpoint(snapshot).ok());
  snapshot.digest = "d2";
  ASSERT_TRUE(metadata->AddCheckpoint(snapshot).ok());
  EXPECT_TRUE(metadata->Removals()->empty()) << "nothing was replaced";
  add("one", "d3");
  ASSERT_TRUE(metadata->LearnCheckpoint(CheckpointOf("one", "d4", 1)).ok());
  const auto rows = metadata->Removals();
  ASSERT_EQ(rows->size(), 2u);
  EXPECT_EQ(rows->at(0).digest, "d2");
  EXPECT_EQ(rows->at(1).digest, "d3");
}

// As servers of those versions have left it.
constexpr char kVersion1[] = R"(
CREATE TABLE lease (
  only INTEGER PRIMARY KEY CHECK (only = 1), epoch INTEGER NOT NULL);
INSERT INTO lease VALUES (1, 41);
CREATE TABLE sessions (
  session_id TEXT PRIMARY KEY, finished INTEGER NOT NULL);
INSERT INTO sessions VALUES ('s-1', 1);
CREATE TABLE jobs (
  ordinal INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL UNIQUE,
  spec BLOB NOT NULL, created_microseconds INTEGER NOT NULL,
  state INTEGER NOT NULL, error BLOB NOT NULL, profile BLOB NOT NULL,
  log_watermark INTEGER NOT NULL, log_begin INTEGER NOT NULL);
INSERT INTO jobs VALUES (1, 'a', x'0102', 77, 0, x'', x'03', 1000, 200);
CREATE TABLE handles (
  job_id TEXT NOT NULL, number INTEGER NOT NULL, model_id TEXT NOT NULL,
  session_id TEXT NOT NULL, request BLOB NOT NULL, attached INTEGER NOT NULL,
  closed_below INTEGER NOT NULL, fenced INTEGER NOT NULL,
  PRIMARY KEY (job_id, number)) WITHOUT ROWID;
INSERT INTO handles VALUES ('a', 1, 'a.model', 's-1', x'04', 0, 5, 0);
CREATE TABLE operations (
  job_id TEXT NOT NULL, handle INTEGER NOT NULL, seq INTEGER NOT NULL,
  outcome BLOB NOT NULL, PRIMARY KEY (job_id, handle, seq)) WITHOUT ROWID;
INSERT INTO operations VALUES ('a', 1, 3, x'0506');
CREATE TABLE recovery_points (
  job_id TEXT NOT NULL, number INTEGER NOT NULL, replay_from INTEGER NOT NULL,
  optimizer_step INTEGER NOT NULL, weight_version INTEGER NOT NULL,
  PRIMARY KEY (job_id, number)) WITHOUT ROWID;
INSERT INTO recovery_points VALUES ('a', 9, 300, 8, 7);
PRAGMA user_version=1)";
constexpr char kVersion2[] = R"(
CREATE TABLE server (
  only INTEGER PRIMARY KEY CHECK (only = 1), id TEXT NOT NULL);
INSERT INTO server VALUES (1, '0123456789ab');
PRAGMA user_version=2)";
constexpr char kVersion3[] = R"(
CREATE TABLE checkpoints (
  path TEXT PRIMARY KEY, job_id TEXT NOT NULL, digest TEXT NOT NULL,
  kind TEXT NOT NULL, promotable INTEGER NOT NULL,
  created_microseconds INTEGER NOT NULL,
  expires_microseconds INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX checkpoints_of_job
  ON checkpoints (job_id, created_microseconds);
CREATE TABLE removals (
  path TEXT PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO removals VALUES ('jobs/a/checkpoints/gone', 'd0');
PRAGMA user_version=3)";

TEST_F(MetadataTest, WhatOlderServersHaveWrittenIsKept) {
  for (const int version : {1, 2, 3}) {
    for (const char* end : {"", "-wal", "-shm"}) {
      std::filesystem::remove(path() + end);
    }
    Execute(kVersion1);
    if (version >= 2) Execute(kVersion2);
    if (version >= 3) Execute(kVersion3);
    for (int opening = 0; opening < 2; ++opening) {
      const auto metadata = Open();
      EXPECT_EQ(metadata->epoch(), 42 + opening);
      EXPECT_EQ(metadata->server_id().size(), 12u);
      if (version >= 2) {
        EXPECT_EQ(metadata->server_id(), "0123456789ab");
      }
      EXPECT_TRUE(metadata->Sessions()->at(0).finished);
      const JobRow job = metadata->Jobs()->at(0);
      EXPECT_EQ(job.job_id, "a");
      EXPECT_EQ(job.spec, "\1\2");
      EXPECT_EQ(job.created_microseconds, 77);
      EXPECT_EQ(job.log_watermark, 1000);
      EXPECT_EQ(job.log_begin, 200);
      EXPECT_EQ(metadata->Handles("a")->at(0).closed_below, 5);
      EXPECT_EQ(metadata->Operations("a")->at(0).outcome, "\5\6");
      EXPECT_EQ(metadata->Points("a")->at(0).replay_from, 300);
      // And what is new works.
      ASSERT_TRUE(metadata->AddCheckpoint(CheckpointOf("one", "d1", 100)).ok());
      EXPECT_EQ(metadata->Checkpoints()->size(), 1u);
      EXPECT_EQ(metadata->Removals()->size(), version >= 3 ? 1u : 0u);
      ASSERT_TRUE(metadata->AddChoices("a", {{0, "chosen"}}).ok());
      EXPECT_EQ(metadata->Choices("a")->size(), opening + 1u);
    }
  }
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
