// SPDX-License-Identifier: Apache-2.0
// A snapshot that is written while the training goes on has the bytes of one
// that the training stood still for.
#include <gtest/gtest.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint/training_state.h"
#include "tests/equivalence/save_testing.h"
#include "tests/equivalence/sharded_job.h"
#include "tests/equivalence/slow_files.h"
#include "trainer/trainer.h"

namespace gradwire {
namespace {

using std::chrono::milliseconds;

// Without the manifest, which has the time in it.
std::map<std::string, std::string> Weights(const std::string& directory) {
  std::map<std::string, std::string> files = Files(directory);
  EXPECT_EQ(files.erase("snapshot.json"), 1u);
  return files;
}

SnapshotOptions Options(const std::string& directory, SnapshotType type) {
  SnapshotOptions options;
  options.directory = directory;
  options.type = type;
  options.job = "job";
  return options;
}

// A snapshot of a job, rank by rank.
class Snapshot {
 public:
  Snapshot(Job& job, const SnapshotOptions& options) : job_(job) {
    for (int r = 0; r < job.world(); ++r) {
      ends_.push_back(std::make_shared<End>());
    }
    job.OnAll([&](Rank& rank) {
      rank.trainer->BeginSnapshot(
          options,
          [end = ends_[static_cast<size_t>(rank.rank)]](
              const absl::Status& status) { end->written.set_value(status); });
    });
  }
  absl::Status Written() {
    absl::Status first;
    for (const auto& end : ends_) first.Update(end->status.get());
    return first;
  }
  bool HasEnded() const { return IsReady(ends_[0]->status, milliseconds(0)); }
  ExportOutcome Publish() {
    ExportOutcome outcome;
    job_.OnAll([&](Rank& rank) {
      const auto mine = rank.trainer->PublishSnapshot();
      ASSERT_TRUE(mine.ok()) << mine.status();
      if (rank.rank == 0) outcome = *mine;
    });
    return outcome;
  }
  void Abandon() {
    job_.OnAll([](Rank& rank) { rank.trainer->AbandonSnapshot(); });
  }

 private:
  struct End {
    std::promise<absl::Status> written;
    std::shared_future<absl::Status> status = written.get_future().share();
  };
  Job& job_;
  std::vector<std::shared_ptr<End>> ends_;
};

class SnapshotSaveTest : public testing::TestWithParam<Shape> {
 protected:
  Job New(FileSystem* files = nullptr) {
    TrainerOptions options;
    options.precision = GetParam().precision;
    options.moment_precision = GetParam().moments;
    options.files = files;
    return Job("untied", GetParam().world, options, GetParam().replicas);
  }
  static void Save(Job& job, const std::string& path, SnapshotType type) {
    job.OnAll([&](Rank& rank) {
      const auto saved = rank.trainer->SaveSnapshot(Options(path, type));
      ASSERT_TRUE(saved.ok()) << saved.status();
    });
  }
  // A base after a step, and a delta to it after two, of a training that stood
  // still for them.
  std::string Undisturbed() {
    Job job = New();
    const std::string path = Fresh("undisturbed");
    Train(job, 0, 1);
    Save(job, path + "/base", SnapshotType::kBase);
    Train(job, 1, 2);
    Save(job, path + "/delta", SnapshotType::kDelta);
    return path;
  }

  Gate gate_;
  SlowFiles files_{[this] { return gate_.Pass(); }};
};

TEST_P(SnapshotSaveTest, HasTheBytesOfOneThatTheTrainingStoodStillFor) {
  const std::string want = Undisturbed();
  Job job = New(&files_), undisturbed = New();
  Train(undisturbed, 0, 3);
  const std::string path = Fresh("overlapped");
  Train(job, 0, 1);
  for (uint32_t step = 0; step < 2; ++step) {
    const std::string name = step == 0 ? "base" : "delta";
    gate_.Close();
    Snapshot snapshot(
        job, Options(path + "/" + name,
                     step == 0 ? SnapshotType::kBase : SnapshotType::kDelta));
    ASSERT_TRUE(gate_.Await(1));
    Backward(job, step + 1);
    EXPECT_FALSE(snapshot.HasEnded());
    const auto next =
        std::async(std::launch::async, [&] { job.Step(Params()); });
    // Of a sharded model they are gathered before, and of a delta compared.
    const bool waits = GetParam().writers() == 1 && step == 0;
    EXPECT_EQ(IsReady(next, milliseconds(waits ? 200 : 60000)), !waits);
    gate_.Allow(kAny);
    next.wait();
    ASSERT_TRUE(snapshot.Written().ok());
    EXPECT_FALSE(std::filesystem::exists(path + "/" + name));
    const ExportOutcome outcome = snapshot.Publish();
    EXPECT_EQ(outcome.type, name);
    EXPECT_EQ(outcome.optimizer_step, step + 1);
    EXPECT_EQ(outcome.weight_version, step + 1);
    EXPECT_EQ(Weights(path + "/" + name), Weights(want + "/" + name));
  }
  EXPECT_EQ(job.Weights(), undisturbed.Weights());
}

TEST_P(SnapshotSaveTest, GoesOnBesideACheckpoint) {
  Job job = New(&files_), still = New();
  Train(job, 0, 1);
  Train(still, 0, 1);
  const std::string path = Fresh("both");
  Save(still, path + "/snapshots/still", SnapshotType::kBase);
  still.OnAll([&](Rank& rank) {
    ASSERT_TRUE(rank.trainer->SaveState(path + "/saved_still", {}).ok());
  });
  Snapshot snapshot(job,
                    Options(path + "/snapshots/beside", SnapshotType::kBase));
  std::vector<std::promise<absl::Status>> saved(
      static_cast<size_t>(job.world()));
  job.OnAll([&](Rank& rank) {
    const absl::Status begun = rank.trainer->BeginSave(
        path + "/saved_beside", false, [&, r = rank.rank](const auto& status) {
          saved[static_cast<size_t>(r)].set_value(status);
        });
    ASSERT_TRUE(begun.ok()) << begun;
  });
  ASSERT_TRUE(gate_.Await(1 + GetParam().writers()));
  Backward(job, 1);
  const auto step = std::async(std::launch::async, [&] { job.Step(Params()); });
  gate_.Allow(kAny);
  step.wait();
  ASSERT_TRUE(snapshot.Written().ok());
  for (auto& written : saved) ASSERT_TRUE(written.get_future().get().ok());
  job.OnAll(
      [&](Rank& rank) { ASSERT_TRUE(rank.trainer->PublishSave({}).ok()); });
  snapshot.Publish();
  EXPECT_EQ(Weights(path + "/snapshots/beside"),
            Weights(path + "/snapshots/still"));
  EXPECT_EQ(Files(path + "/saved_beside"), Files(path + "/saved_still"));
  Train(still, 1, 2);
  EXPECT_EQ(job.Weights(), still.Weights());
}

TEST_P(SnapshotSaveTest, AFullDiskLosesNothing) {
  Job job = New(&files_), undisturbed = New();
  Train(job, 0, 1);
  Train(undisturbed, 0, 3);
  const std::string path = Fresh("full");
  Snapshot snapshot(job, Options(path, SnapshotType::kBase));
  ASSERT_TRUE(gate_.Await(1));
  Backward(job, 1);
  // A step that waits goes on.
  gate_.Fail(ENOSPC);
  job.Step(Params());
  EXPECT_EQ(Reason(snapshot.Written()), "STORAGE_FULL");
  snapshot.Abandon();
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_FALSE(std::filesystem::exists(PendingPath(path)));
  Train(job, 2, 3);
  EXPECT_EQ(job.Weights(), undisturbed.Weights());
  gate_.Fail(0);
  gate_.Allow(kAny);
  Save(job, path, SnapshotType::kBase);
}

TEST_P(SnapshotSaveTest, TheEndOfTheTrainerLeavesNothing) {
  const std::string path = Fresh("ended");
  {
    auto job = std::make_unique<Job>(New(&files_));
    Snapshot snapshot(*job, Options(path, SnapshotType::kBase));
    ASSERT_TRUE(gate_.Await(1));
    // It writes no more than what it was at.
    std::thread disk([&] {
      std::this_thread::sleep_for(milliseconds(100));
      gate_.Allow(4);
    });
    job.reset();
    disk.join();
    EXPECT_EQ(snapshot.Written().code(), absl::StatusCode::kCancelled);
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_FALSE(std::filesystem::exists(PendingPath(path)));
}

TEST_P(SnapshotSaveTest, WhatCannotBeIsToldByTheThread) {
  Job job = New();
  const std::string path = Fresh("told");
  Save(job, path + "/a", SnapshotType::kBase);
  SnapshotOptions options = Options(path + "/a", SnapshotType::kBase);
  options.operation = "another";
  Snapshot taken(job, options);
  EXPECT_EQ(Reason(taken.Written()), "SNAPSHOT_EXISTS");
  taken.Abandon();
  options = Options(path + "/b", SnapshotType::kDelta);
  options.parent = "none";
  Snapshot orphan(job, options);
  EXPECT_EQ(Reason(orphan.Written()), "DELTA_PARENT_UNAVAILABLE");
  orphan.Abandon();
  // The training goes on.
  Job undisturbed = New();
  Train(undisturbed, 0, 1);
  Train(job, 0, 1);
  EXPECT_EQ(job.Weights(), undisturbed.Weights());
}

constexpr auto kF32 = Precision::kF32, kBF16 = Precision::kBF16;

INSTANTIATE_TEST_SUITE_P(
    All, SnapshotSaveTest,
    testing::Values(Shape{1, 1, kF32, kF32}, Shape{1, 1, kBF16, kBF16},
                    Shape{3, 1, kF32, kF32}, Shape{3, 1, kBF16, kBF16},
                    Shape{2, 2, kBF16, kF32}, Shape{4, 2, kBF16, kF32}),
    [](const testing::TestParamInfo<Shape>& info) {
      return std::to_string(info.param.world) + "ranks" +
             std::to_string(info.param.replicas) + "groups" +
             std::to_string(info.index);
    });

}  // namespace
}  // namespace gradwire
