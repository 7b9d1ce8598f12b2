// SPDX-License-Identifier: Apache-2.0
// What stays of a job's snapshots, and what goes.
#include "checkpoint/snapshot/list.h"

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "checkpoint/snapshot/snapshot_fixture.h"

namespace gradwire {
namespace {

TEST_F(SnapshotTest, AParentStaysAndALeafGoes) {
  const TestWeights weights = MakeWeights(1);
  Must(Save("a", weights));
  Must(Save("b", Step(weights, 1), {.kind = SnapshotKind::kDelta}));
  const absl::Status kept = RemoveSnapshot(*files_, "/s", "a");
  EXPECT_EQ(ReasonOf(kept), "SNAPSHOT_HAS_CHILDREN");
  EXPECT_EQ(GetErrorDetail(kept)->metadata.at("child"), "b");
  EXPECT_EQ(Read("b"), Step(weights, 1).File());
  EXPECT_TRUE(RemoveSnapshot(*files_, "/s", "b").ok());
  EXPECT_TRUE(RemoveSnapshot(*files_, "/s", "a").ok());
  EXPECT_TRUE(files_->List("/s")->empty());
  EXPECT_EQ(ReasonOf(RemoveSnapshot(*files_, "/s", "a")),
            "CHECKPOINT_NOT_FOUND");
  // Also one that nobody can read.
  Must(Save("c", weights));
  Overwrite("/s/c/snapshot.json", "");
  EXPECT_EQ(ListSnapshots(*files_, "/s")->size(), 1u);
  EXPECT_TRUE(RemoveSnapshot(*files_, "/s", "c").ok());
}

// Whatever comes first, no delta is without its parent.
TEST_F(SnapshotTest, AParentIsNotRemovedUnderASaveThatHasBegun) {
  const TestWeights weights = MakeWeights(1);
  Must(Save("a", weights));
  SnapshotRequest request;
  request.directory = "/s/b";
  request.kind = SnapshotKind::kDelta;
  request.tensors = weights.infos;
  auto plan = PlanSnapshot(*files_, request);
  ASSERT_TRUE(plan.ok());
  const auto append = [&](SnapshotWriter& writer) {
    for (size_t i = 0; i < weights.infos.size(); ++i) {
      writer.Append(weights.values[i].data(), weights.infos[i].num_elements());
    }
  };
  {
    auto writer = SnapshotWriter::Create(*files_, *std::move(plan));
    ASSERT_TRUE(writer.ok());
    EXPECT_EQ(ReasonOf(RemoveSnapshot(*files_, "/s", "a")),
              "SNAPSHOT_HAS_CHILDREN");
    append(**writer);
    ASSERT_TRUE((*writer)->Finish(0).ok());
    EXPECT_TRUE((*writer)->Publish().ok());
  }
  EXPECT_EQ(Read("b"), weights.File());
  // Removed between the plan and the save.
  EXPECT_TRUE(RemoveSnapshot(*files_, "/s", "b").ok());
  plan = PlanSnapshot(*files_, request);
  ASSERT_TRUE(plan.ok());
  EXPECT_TRUE(RemoveSnapshot(*files_, "/s", "a").ok());
  {
    auto writer = SnapshotWriter::Create(*files_, *std::move(plan));
    ASSERT_TRUE(writer.ok());
    append(**writer);
    ASSERT_TRUE((*writer)->Finish(0).ok());
    EXPECT_EQ(ReasonOf((*writer)->Publish().status()),
              "DELTA_PARENT_UNAVAILABLE");
  }
  EXPECT_TRUE(files_->List("/s")->empty());
}

// Does something between what a removal has looked at and its renaming.
class InterruptedFileSystem : public CrashFileSystem {
 public:
  using CrashFileSystem::CrashFileSystem;
  std::function<void()> before_rename;
  std::vector<std::string> changes;

 protected:
  int CallRename(const std::string& from, const std::string& to) override {
    if (before_rename) std::exchange(before_rename, nullptr)();
    changes.push_back("rename " + from + " " + to);
    return CrashFileSystem::CallRename(from, to);
  }
  int CallRemove(const std::string& path) override {
    changes.push_back("remove " + path);
    return CrashFileSystem::CallRemove(path);
  }
  int CallSyncDirectory(const std::string& path) override {
    changes.push_back("sync " + path);
    return CrashFileSystem::CallSyncDirectory(path);
  }
};

// The disk's model knows a directory by its name, and could not bring back the
// old name without the files.
TEST_F(SnapshotTest, TheNameIsGoneForGoodBeforeAnyFileIs) {
  Must(Save("a", MakeWeights(1)));
  InterruptedFileSystem files(files_->Latest());
  ASSERT_TRUE(RemoveSnapshot(files, "/s", "a").ok());
  EXPECT_EQ(files.changes,
            (std::vector<std::string>{"rename /s/a /s/.a~removed", "sync /s",
                                      "remove /s/.a~removed/config.json",
                                      "remove /s/.a~removed/model.safetensors",
                                      "remove /s/.a~removed/snapshot.json",
                                      "remove /s/.a~removed"}));
}

TEST_F(SnapshotTest, AParentThatGotAChildInTheMeantimeIsPutBack) {
  const TestWeights weights = MakeWeights(1);
  Must(Save("a", weights));
  for (const bool finished : {true, false}) {
    SCOPED_TRACE(finished);
    InterruptedFileSystem files(files_->Latest());
    std::unique_ptr<PendingDirectory> pending;
    files.before_rename = [&] {
      if (finished) {
        Must(SaveTestSnapshot(files, "/s/b", Step(weights, 1),
                              {.kind = SnapshotKind::kDelta}));
      } else {
        auto begun = PendingDirectory::Create(files, "/s/b", "a");
        ASSERT_TRUE(begun.ok());
        pending = std::make_unique<PendingDirectory>(*std::move(begun));
      }
    };
    EXPECT_EQ(ReasonOf(RemoveSnapshot(files, "/s", "a")),
              "SNAPSHOT_HAS_CHILDREN");
    EXPECT_FALSE(files.before_rename);
    EXPECT_TRUE(ReadTestSnapshot(files, "/s", "a").ok());
    files.ForEachPowerLoss(files.num_events(), 50, 1, [&](const DiskImage& d) {
      CrashFileSystem disk(d);
      EXPECT_TRUE(ReadTestSnapshot(disk, "/s", "a").ok());
    });
  }
}

TEST_F(SnapshotTest, WhatHasExpiredGoesChildrenFirst) {
  const TestWeights weights = MakeWeights(1);
  const int64_t now = TestSave().now_micros;
  const TestSave base{.ttl_seconds = 10};
  const TestSave delta{.kind = SnapshotKind::kDelta, .ttl_seconds = 10};
  const TestSave kept{.kind = SnapshotKind::kDelta, .ttl_seconds = 1000};
  Must(Save("z", weights, base));
  Must(Save("y", weights, delta));
  Must(Save("p", weights, base));
  Must(Save("c", weights, kept));
  Must(Save("forever", weights));
  EXPECT_TRUE(RemoveExpired(*files_, "/s", now)->empty());
  EXPECT_EQ(*RemoveExpired(*files_, "/s", now + 11'000'000),
            (std::vector<std::string>{"y", "z"}));
  // `p` has expired, and is needed.
  EXPECT_EQ(*files_->List("/s"),
            (std::vector<std::string>{"c", "forever", "p"}));
  EXPECT_EQ(*RemoveExpired(*files_, "/s", now + 1001'000'000),
            (std::vector<std::string>{"c", "p"}));
}

TEST_F(SnapshotTest, RecoveryRemovesWhatIsHalfAndPutsBackWhatIsNeeded) {
  const TestWeights weights = MakeWeights(1);
  Must(Save("a", weights));
  Must(Save("b", weights, {.kind = SnapshotKind::kDelta}));
  Must(Save("c", weights));
  ASSERT_TRUE(files_->Rename("/s/a", "/s/.a~removed").ok());
  ASSERT_TRUE(files_->Rename("/s/c", "/s/.c~removed").ok());
  ASSERT_TRUE(files_->MakeDirectory("/s/.d~b.pending").ok());
  ASSERT_TRUE(files_->MakeDirectory("/s/.e.pending").ok());
  EXPECT_TRUE(RecoverSnapshots(*files_, "/s").ok());
  EXPECT_EQ(*files_->List("/s"), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(Read("b"), weights.File());
  EXPECT_TRUE(RecoverSnapshots(*files_, "/none").ok());
}

}  // namespace
}  // namespace gradwire
