// SPDX-License-Identifier: Apache-2.0
// A checkpoint that is written while the training goes on has the bytes of one
// that the training stood still for.
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <future>
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

// A save of a job, rank by rank.
class Save {
 public:
  Save(Job& job, const std::string& directory) : job_(job) {
    for (int r = 0; r < job.world(); ++r) {
      ends_.push_back(std::make_shared<End>());
    }
    job.OnAll([&](Rank& rank) {
      const auto written = [end = ends_[static_cast<size_t>(rank.rank)]](
                               const absl::Status& status) {
        end->written.set_value(status);
      };
      const absl::Status begun =
          rank.trainer->BeginSave(directory, false, written);
      ASSERT_TRUE(begun.ok()) << begun;
    });
  }
  // The first rank's error, when all have ended.
  absl::Status Written() {
    absl::Status first;
    for (const auto& end : ends_) {
      const absl::Status status = end->status.get();
      if (first.ok()) first = status;
    }
    return first;
  }
  bool HasEnded() const {
    for (const auto& end : ends_) {
      if (!IsReady(end->status, milliseconds(0))) return false;
    }
    return true;
  }
  SavedState Publish() {
    SavedState saved;
    job_.OnAll([&](Rank& rank) {
      const auto mine = rank.trainer->PublishSave({{"who", "a test"}});
      ASSERT_TRUE(mine.ok()) << mine.status();
      if (rank.rank == 0) saved = *mine;
    });
    return saved;
  }
  void Abandon() {
    job_.OnAll([](Rank& rank) { rank.trainer->AbandonSave(); });
  }

 private:
  struct End {
    std::promise<absl::Status> written;
    std::shared_future<absl::Status> status = written.get_future().share();
  };
  Job& job_;
  // They outlive this: a trainer that ends tells them.
  std::vector<std::shared_ptr<End>> ends_;
};

class SaveTest : public testing::TestWithParam<Shape> {
 protected:
  Job New(FileSystem* files = nullptr) {
    TrainerOptions options;
    options.precision = GetParam().precision;
    options.moment_precision = GetParam().moments;
    options.files = files;
    return Job("untied", GetParam().world, options, GetParam().replicas);
  }
  // After `steps`, while the training stands still.
  std::string Undisturbed(uint32_t steps) {
    Job job = New();
    Train(job, 0, steps);
    const std::string path = Fresh("undisturbed");
    job.OnAll([&](Rank& rank) {
      const auto saved = rank.trainer->SaveState(path, {{"who", "a test"}});
      ASSERT_TRUE(saved.ok()) << saved.status();
    });
    return path;
  }

  Gate gate_;
  SlowFiles files_{[this] { return gate_.Pass(); }};
};

TEST_P(SaveTest, HasTheBytesOfOneThatTheTrainingStoodStillFor) {
  for (const uint32_t before : {0, 2}) {
    gate_.Close();
    Job job = New(&files_), undisturbed = New();
    Train(job, 0, before);
    Train(undisturbed, 0, before + 3);
    const std::string path = Fresh("overlapped");
    Save save(job, path);
    ASSERT_TRUE(gate_.Await(GetParam().writers()));
    // Nothing is written yet, and all of this goes on.
    Backward(job, before);
    EXPECT_FALSE(save.HasEnded());
    // The steps wait for each unit; the disk writes when it pleases.
    std::thread disk([&] {
      for (int write = 0; write < 300; ++write) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        gate_.Allow(1);
      }
      gate_.Allow(kAny);
    });
    job.Step(Params());
    Train(job, before + 1, before + 3);
    ASSERT_TRUE(save.Written().ok());
    disk.join();
    const SavedState saved = save.Publish();
    EXPECT_EQ(saved.optimizer_step, before);
    EXPECT_EQ(saved.weight_version, before);
    EXPECT_EQ(Files(path), Files(Undisturbed(before)));
    EXPECT_EQ(job.Weights(), undisturbed.Weights());
  }
}

TEST_P(SaveTest, AStepWaitsForTheUnitThatItChanges) {
  Job job = New(&files_);
  Train(job, 0, 1);
  Save save(job, Fresh("waits"));
  ASSERT_TRUE(gate_.Await(GetParam().writers()));
  Backward(job, 1);
  const auto step = std::async(std::launch::async, [&] { job.Step(Params()); });
  // It cannot end before the last unit is written: weight, m and v of a unit
  // that has elements on a rank are a write each.
  gate_.Allow(GetParam().writers());
  EXPECT_FALSE(IsReady(step, milliseconds(200)));
  gate_.Allow(kAny);
  step.wait();
  EXPECT_TRUE(save.Written().ok());
  save.Publish();
}

TEST_P(SaveTest, ALoadWaitsForWhatIsSavedAndTheSaveGoesOn) {
  const std::string other = Undisturbed(1);
  Job job = New(&files_);
  Train(job, 0, 2);
  const std::string path = Fresh("loaded");
  Save save(job, path);
  ASSERT_TRUE(gate_.Await(GetParam().writers()));
  const auto load = std::async(std::launch::async, [&] {
    job.OnAll([&](Rank& rank) {
      EXPECT_TRUE(rank.trainer->LoadState(other, true).ok());
    });
  });
  EXPECT_FALSE(IsReady(load, milliseconds(200)));
  gate_.Allow(kAny);
  load.wait();
  ASSERT_TRUE(save.Written().ok());
  EXPECT_EQ(save.Publish().optimizer_step, 2);
  EXPECT_EQ(Files(path), Files(Undisturbed(2)));
  EXPECT_EQ(job.trainer(0).optimizer_step(), 1);
}

TEST_P(SaveTest, AFullDiskLosesNothing) {
  Job job = New(&files_), undisturbed = New();
  Train(job, 0, 1);
  Train(undisturbed, 0, 3);
  const std::string path = Fresh("full");
  Save save(job, path);
  ASSERT_TRUE(gate_.Await(GetParam().writers()));
  Backward(job, 1);
  // Each rank's first piece fits, and no more; a step that waits goes on.
  gate_.Allow(GetParam().writers());
  gate_.Fail(ENOSPC);
  job.Step(Params());
  EXPECT_EQ(Reason(save.Written()), "STORAGE_FULL");
  save.Abandon();
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_FALSE(std::filesystem::exists(PendingPath(path)));
  Train(job, 2, 3);
  EXPECT_EQ(job.Weights(), undisturbed.Weights());
  // Now there is room, under the same name.
  gate_.Fail(0);
  gate_.Allow(kAny);
  Save again(job, path);
  ASSERT_TRUE(again.Written().ok());
  again.Publish();
  EXPECT_EQ(Files(path), Files(Undisturbed(3)));
}

TEST_P(SaveTest, TheEndOfTheTrainerLeavesNothing) {
  const std::string path = Fresh("ended");
  {
    Job job = New(&files_);
    Save save(job, path);
    ASSERT_TRUE(gate_.Await(GetParam().writers()));
    gate_.Allow(GetParam().writers());
    ASSERT_TRUE(gate_.Await(GetParam().writers()));
    gate_.Allow(kAny);
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

constexpr auto kF32 = Precision::kF32, kBF16 = Precision::kBF16;

INSTANTIATE_TEST_SUITE_P(All, SaveTest,
                         testing::Values(Shape{1, 1, kF32, kF32},
                                         Shape{1, 1, kBF16, kBF16},
                                         Shape{3, 1, kF32, kF32},
                                         Shape{3, 1, kBF16, kBF16},
                                         Shape{4, 2, kBF16, kF32}),
                         [](const testing::TestParamInfo<Shape>& info) {
                           return std::to_string(info.param.world) + "ranks" +
                                  std::to_string(info.param.replicas) +
                                  "groups" + std::to_string(info.index);
                         });

}  // namespace
}  // namespace gradwire
