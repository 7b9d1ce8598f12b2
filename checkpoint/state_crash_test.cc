// SPDX-License-Identifier: Apache-2.0
// A save is interrupted in every way: its checkpoint is whole, or not there.
#include <gtest/gtest.h>

#include <random>

#include "base/status.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/state_testing.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

using Fault = CrashFileSystem::Fault;
using Lie = CrashFileSystem::Lie;

constexpr Fault kFaults[] = {Fault::kKill, Fault::kNoSpace, Fault::kIoError,
                             Fault::kShortWrite};
constexpr int64_t kPageBytes = 64;
constexpr int64_t kChunkBytes = 48;

// A state directory with a checkpoint, what an earlier process has left of
// another, and a save of that one by two ranks.
class CrashSave {
 public:
  explicit CrashSave(bool with_leftovers = true) {
    CrashFileSystem files({.files = {}, .directories = {"/s"}}, kPageBytes);
    EXPECT_TRUE(Save(files, "/s/old", old_, DealPieces(old_, 3, 1), 64).ok());
    start_ = files.Latest();
    if (!with_leftovers) return;
    start_.directories.insert("/s/.new.pending");
    start_.files["/s/.new.pending/rank-00000.data"] = "left";
    start_.files["/s/.new.pending/rank-00007.json"] = "left";
  }

  const DiskImage& start() const { return start_; }

  absl::Status Run(FileSystem& files) const {
    return Save(files, "/s/new", new_, DealPieces(new_, 2, 2), kChunkBytes)
        .status();
  }

  // What is wrong on a disk; "" if nothing. `promised`: Publish has said OK.
  std::string Check(const DiskImage& image, bool promised) const {
    CrashFileSystem files(image);
    absl::Status status;
    std::string wrong = Compare(files, "/s/old", old_, &status);
    if (!wrong.empty()) return "old " + wrong;
    wrong = Compare(files, "/s/new", new_, &status);
    if (wrong.empty()) return "";
    if (!promised && ReasonOf(status) == "CHECKPOINT_NOT_FOUND" &&
        !image.directories.contains("/s/new")) {
      return "";
    }
    return "new " + wrong;
  }

  // The same after any legal power loss.
  std::string CheckPowerLoss(const CrashFileSystem& files, int64_t event,
                             int64_t limit, bool promised,
                             int64_t* disks) const {
    std::string violation;
    *disks += files.ForEachPowerLoss(event, limit, static_cast<uint64_t>(event),
                                     [&](const DiskImage& image) {
                                       if (violation.empty())
                                         violation = Check(image, promised);
                                     });
    if (violation.empty()) return "";
    return "after event " + std::to_string(event) + ": " + violation;
  }

  // Of a save without faults, at any time.
  std::string CheckAnyPowerLoss(CrashFileSystem& files, int64_t limit,
                                int64_t* disks) const {
    const absl::Status saved = Run(files);
    if (!saved.ok()) return saved.ToString();
    const int64_t end = files.num_events();
    // From the last on, where most of what is wrong is found at once.
    for (int64_t event = end; event >= 0; --event) {
      const std::string violation =
          CheckPowerLoss(files, event, limit, event == end, disks);
      if (!violation.empty()) return violation;
    }
    return "";
  }

 private:
  const TestState old_ = MakeState(19, 1, std::nullopt);
  const TestState new_ = MakeState(29, 2, DType::kBF16);
  DiskImage start_;
};

TEST(StateCrashTest, ThePowerFailsAtAnyTime) {
  const CrashSave save;
  for (const int64_t page_bytes : {32, 64, 512}) {
    CrashFileSystem files(save.start(), page_bytes);
    int64_t disks = 0;
    EXPECT_EQ(save.CheckAnyPowerLoss(files, 200, &disks), "");
    EXPECT_GT(disks, 1000);
    RecordProperty("disks_" + std::to_string(page_bytes),
                   std::to_string(disks));
  }
}

bool HasPending(const DiskImage& image) {
  return image.directories.contains("/s/.new.pending");
}

TEST(StateCrashTest, AnyCallFails) {
  const CrashSave save;
  int64_t faults = 0, disks = 0, published = 0;
  std::mt19937 random(1);
  for (const Fault fault : kFaults) {
    for (int64_t call = 1;; ++call) {
      SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)) +
                   " at call " + std::to_string(call));
      CrashFileSystem files(save.start(), kPageBytes);
      files.FailAt(call, fault);
      const bool saved = save.Run(files).ok();
      if (call > files.calls()) break;
      if (files.faults() == 0) {
        ASSERT_TRUE(saved);
        continue;
      }
      ++faults;
      ASSERT_FALSE(saved);
      // What other processes see, and what a power loss leaves.
      ASSERT_EQ(save.Check(files.Latest(), false), "");
      const int64_t end = files.num_events();
      for (int i = 0; i < 4; ++i) {
        const int64_t event =
            i == 0 ? end : static_cast<int64_t>(random()) % (end + 1);
        ASSERT_EQ(save.CheckPowerLoss(files, event, 30, false, &disks), "");
      }
      // The partial one was removed, unless nobody was left to do it, or it was
      // the earlier one, in calls 3 to 9, that could not be removed.
      const bool visible = files.Latest().directories.contains("/s/new");
      if (fault != Fault::kKill && call > 9) {
        ASSERT_FALSE(HasPending(files.Latest()));
      }
      // The next process. What it finds after this it may rely on.
      files.Revive();
      ASSERT_TRUE(RemoveLeftovers(files, "/s").ok());
      ASSERT_FALSE(HasPending(files.Latest()));
      ASSERT_EQ(
          save.CheckPowerLoss(files, files.num_events(), 30, visible, &disks),
          "");
      published += visible ? 1 : 0;
      const absl::Status again = save.Run(files);
      ASSERT_EQ(ReasonOf(again), visible ? "CHECKPOINT_EXISTS" : "");
      ASSERT_EQ(
          save.CheckPowerLoss(files, files.num_events(), 30, true, &disks), "");
    }
  }
  EXPECT_GT(faults, 100);
  EXPECT_GT(disks, 5000);
  // Only where the last sync was what failed: killed, or with EIO.
  EXPECT_EQ(published, 2);
  RecordProperty("faults", std::to_string(faults));
  RecordProperty("disks", std::to_string(disks));
}

TEST(StateCrashTest, AnyCallOfALoadFails) {
  const TestState state = MakeState(29, 2, DType::kBF16);
  CrashFileSystem saved;
  ASSERT_TRUE(Save(saved, "/a", state, DealPieces(state, 3, 2), 48).ok());
  int64_t faults = 0;
  for (int64_t call = 1;; ++call) {
    CrashFileSystem files(saved.Latest());
    files.FailAt(call, Fault::kIoError);
    absl::Status status;
    const std::string wrong = Compare(files, "/a", state, &status);
    if (call > files.calls()) break;
    ++faults;
    ASSERT_EQ(ReasonOf(status), "STORAGE_IO") << call << " " << wrong;
  }
  EXPECT_GT(faults, 20);
}

// That the tests above see what they should.

bool IsCaught(const CrashSave& save, Lie lie, int64_t call) {
  CrashFileSystem files(save.start(), kPageBytes);
  files.TellLie(lie, call);
  int64_t disks = 0;
  return !save.CheckAnyPowerLoss(files, 200, &disks).empty();
}

TEST(StateSeededBugTest, NoKindOfSyncMayBeLeftOut) {
  const CrashSave save;
  EXPECT_FALSE(IsCaught(save, Lie::kNone, 0));
  EXPECT_TRUE(IsCaught(save, Lie::kSync, 0));
  EXPECT_TRUE(IsCaught(save, Lie::kSyncDirectory, 0));
  EXPECT_TRUE(IsCaught(save, Lie::kSyncBeforeRename, 0));
}

// Data and table of two ranks and the manifest; the directory and its parent.
TEST(StateSeededBugTest, EachSyncIsNeeded) {
  const CrashSave save(/*with_leftovers=*/false);
  CrashFileSystem honest(save.start(), kPageBytes);
  ASSERT_TRUE(save.Run(honest).ok());
  for (const auto& [lie, expected] :
       {std::pair(Lie::kSync, 5), std::pair(Lie::kSyncDirectory, 2)}) {
    int syncs = 0;
    for (int64_t call = 1; call <= honest.calls(); ++call) {
      CrashFileSystem files(save.start(), kPageBytes);
      files.TellLie(lie, call);
      ASSERT_TRUE(save.Run(files).ok());
      if (files.num_events() == honest.num_events()) continue;
      ++syncs;
      EXPECT_TRUE(IsCaught(save, lie, call))
          << static_cast<int>(lie) << " at call " << call;
    }
    EXPECT_EQ(syncs, expected);
  }
}

}  // namespace
}  // namespace gradwire
