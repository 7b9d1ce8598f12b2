// SPDX-License-Identifier: Apache-2.0
// Saves, removals and promotions are interrupted in every way: what is there is
// whole, and no delta loses its parent.
#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "checkpoint/crash_file_system.h"
#include "checkpoint/snapshot/list.h"
#include "checkpoint/snapshot/promote.h"
#include "checkpoint/snapshot/snapshot_testing.h"

namespace gradwire {
namespace {

using Fault = CrashFileSystem::Fault;
using Lie = CrashFileSystem::Lie;

constexpr Fault kFaults[] = {Fault::kKill, Fault::kNoSpace, Fault::kIoError,
                             Fault::kShortWrite};
constexpr int64_t kPageBytes = 256;
constexpr int64_t kNow = 2'000'000'000'000'000;

// What the snapshot `name` in `directory` has to be.
struct Expected {
  std::string directory, name, file;
  enum { kThere, kNew, kGoing } fate = kThere;
};

// A disk, something that is done to it, and what must be on it afterwards.
struct Scenario {
  std::string label;
  DiskImage start;
  std::function<absl::Status(FileSystem&)> run = {};
  std::vector<Expected> expected = {};
  int syncs = 0, directory_syncs = 0;  // each of which is needed

  // What is wrong on a disk; "" if nothing. `promised`: run has said OK.
  std::string Check(const DiskImage& image, bool promised) const {
    CrashFileSystem files(image);
    for (const Expected& each : expected) {
      const auto found = ReadTestSnapshot(files, each.directory, each.name);
      const bool absent =
          !image.directories.contains(each.directory + "/" + each.name) &&
          ReasonOf(found.status()) == "CHECKPOINT_NOT_FOUND";
      const bool may_be_absent = each.fate == Expected::kGoing ||
                                 (each.fate == Expected::kNew && !promised);
      const bool must_be_absent = each.fate == Expected::kGoing && promised;
      if (absent && may_be_absent) continue;
      if (must_be_absent) return each.name + " is there";
      if (!found.ok()) return each.name + ": " + found.status().ToString();
      if (*found != each.file) return each.name + " has other weights";
    }
    return "";
  }

  std::string CheckPowerLoss(const CrashFileSystem& files, int64_t event,
                             int64_t limit, bool promised,
                             int64_t* disks) const {
    std::string wrong;
    *disks += files.ForEachPowerLoss(event, limit, static_cast<uint64_t>(event),
                                     [&](const DiskImage& image) {
                                       if (!wrong.empty()) return;
                                       // The next server begins with this.
                                       CrashFileSystem next(image);
                                       if (!RecoverSnapshots(next, "/s").ok() ||
                                           !RecoverSnapshots(next, "/m").ok()) {
                                         wrong = "cannot be recovered";
                                         return;
                                       }
                                       wrong = Check(next.Latest(), promised);
                                     });
    return wrong.empty() ? "" : "event " + std::to_string(event) + ": " + wrong;
  }

  std::string CheckAnyPowerLoss(CrashFileSystem& files, int64_t limit,
                                int64_t* disks) const {
    const absl::Status done = run(files);
    if (!done.ok()) return done.ToString();
    const int64_t end = files.num_events();
    for (int64_t event = end; event >= 0; --event) {
      const std::string wrong =
          CheckPowerLoss(files, event, limit, event == end, disks);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }
};

struct Weights {
  const TestWeights base = MakeWeights(1), one = Step(base, 1),
                    two = Step(one, 2), three = Step(two, 3);
};

SnapshotManifest Must(const absl::StatusOr<SnapshotManifest>& saved) {
  EXPECT_TRUE(saved.ok()) << saved.status();
  return saved.ok() ? *saved : SnapshotManifest();
}

DiskImage Empty() { return {.files = {}, .directories = {"/s", "/m"}}; }

// A base and a delta.
DiskImage Chain(const Weights& w, double ttl_seconds = 0,
                int64_t shard_bytes = kShardBytes) {
  CrashFileSystem files(Empty());
  TestSave save{.ttl_seconds = ttl_seconds, .shard_bytes = shard_bytes};
  Must(SaveTestSnapshot(files, "/s/base", w.base, save));
  save.kind = SnapshotKind::kDelta;
  Must(SaveTestSnapshot(files, "/s/one", w.one, save));
  return files.Latest();
}

Scenario SaveBase() {
  const Weights w;
  Scenario s{.label = "SaveBase", .start = Chain(w)};
  s.start.directories.insert("/s/.new.pending");
  s.start.files["/s/.new.pending/model.safetensors"] = "left";
  s.run = [w](FileSystem& files) {
    return SaveTestSnapshot(files, "/s/new", w.two, {.operation = "op"})
        .status();
  };
  s.expected = {{"/s", "base", w.base.File()},
                {"/s", "one", w.one.File()},
                {"/s", "new", w.two.File(), Expected::kNew}};
  s.syncs = 3;
  s.directory_syncs = 2;
  return s;
}

Scenario SaveDelta() {
  const Weights w;
  Scenario s{.label = "SaveDelta", .start = Chain(w)};
  s.start.directories.insert("/s/.new~one.pending");
  s.start.files["/s/.new~one.pending/delta.safetensors"] = "left";
  s.run = [w](FileSystem& files) {
    return SaveTestSnapshot(files, "/s/new", w.two,
                            {.kind = SnapshotKind::kDelta, .operation = "op"})
        .status();
  };
  s.expected = {{"/s", "base", w.base.File()},
                {"/s", "one", w.one.File()},
                {"/s", "new", w.two.File(), Expected::kNew}};
  s.syncs = 2;
  s.directory_syncs = 2;
  return s;
}

// In two files, with an index.
constexpr int64_t kTwoShards = 20;

Scenario SaveShards() {
  const Weights w;
  Scenario s{.label = "SaveShards", .start = Chain(w)};
  s.start.directories.insert("/s/.new.pending");
  for (const char* file :
       {"model-00001-of-00002.safetensors", "model-00003-of-00003.safetensors",
        "model.safetensors.index.json"}) {
    s.start.files[std::string("/s/.new.pending/") + file] = "left";
  }
  s.run = [w](FileSystem& files) {
    return SaveTestSnapshot(files, "/s/new", w.two,
                            {.operation = "op", .shard_bytes = kTwoShards})
        .status();
  };
  s.expected = {{"/s", "base", w.base.File()},
                {"/s", "one", w.one.File()},
                {"/s", "new", w.two.File(), Expected::kNew}};
  s.syncs = 5;  // two shards, index, config.json, manifest
  s.directory_syncs = 2;
  return s;
}

Scenario SaveDeltaToShards() {
  const Weights w;
  Scenario s = SaveDelta();
  s.label = "SaveDeltaToShards";
  s.start = Chain(w, 0, kTwoShards);
  return s;
}

Scenario Remove() {
  const Weights w;
  Scenario s{.label = "Remove", .start = Chain(w)};
  s.run = [](FileSystem& files) { return RemoveSnapshot(files, "/s", "one"); };
  s.expected = {{"/s", "base", w.base.File()},
                {"/s", "one", w.one.File(), Expected::kGoing}};
  s.directory_syncs = 1;
  return s;
}

// A delta to `one` is about to appear, or has appeared, when that is removed:
// it stays.
Scenario RemoveParent() {
  const Weights w;
  Scenario s{.label = "RemoveParent", .start = Chain(w)};
  s.run = [w](FileSystem& files) -> absl::Status {
    const absl::Status saved =
        SaveTestSnapshot(files, "/s/new", w.two,
                         {.kind = SnapshotKind::kDelta, .operation = "op"})
            .status();
    const absl::Status removed = RemoveSnapshot(files, "/s", "one");
    // A save that failed may have left nothing that speaks against it.
    if (saved.ok() && removed.ok()) return absl::InternalError("removed");
    return saved;
  };
  s.expected = {{"/s", "base", w.base.File()},
                {"/s", "new", w.two.File(), Expected::kNew}};
  return s;
}

Scenario Collect() {
  const Weights w;
  Scenario s{.label = "Collect", .start = Chain(w, 5)};
  {
    // Another chain, whose last delta has not expired.
    CrashFileSystem files(s.start);
    Must(SaveTestSnapshot(files, "/s/kept", w.two, {.ttl_seconds = 5}));
    Must(SaveTestSnapshot(files, "/s/child", w.three,
                          {.kind = SnapshotKind::kDelta}));
    s.start = files.Latest();
  }
  s.run = [](FileSystem& files) {
    return RemoveExpired(files, "/s", kNow).status();
  };
  s.expected = {{"/s", "kept", w.two.File()},
                {"/s", "child", w.three.File()},
                {"/s", "one", w.one.File(), Expected::kGoing},
                {"/s", "base", w.base.File(), Expected::kGoing}};
  s.directory_syncs = 1;
  return s;
}

Scenario Promote() {
  const Weights w;
  Scenario s{.label = "Promote", .start = Chain(w)};
  s.run = [](FileSystem& files) {
    return PromoteSnapshot(files, {.directory = "/s",
                                   .name = "one",
                                   .source = "from-one",
                                   .models_directory = "/m",
                                   .model_id = "model",
                                   .now_micros = kNow})
        .status();
  };
  s.expected = {{"/s", "base", w.base.File()},
                {"/s", "one", w.one.File()},
                {"/m", "model", w.one.File(), Expected::kNew}};
  s.syncs = 3;
  s.directory_syncs = 2;
  return s;
}

Scenario PromoteShards() {
  const Weights w;
  Scenario s{.label = "PromoteShards", .start = Chain(w, 0, kTwoShards)};
  s.run = [](FileSystem& files) {
    return PromoteSnapshot(files, {.directory = "/s",
                                   .name = "one",
                                   .source = "from-one",
                                   .models_directory = "/m",
                                   .model_id = "model",
                                   .now_micros = kNow,
                                   .shard_bytes = kTwoShards})
        .status();
  };
  s.expected = {{"/s", "base", w.base.File()},
                {"/s", "one", w.one.File()},
                {"/m", "model", w.one.File(), Expected::kNew}};
  s.syncs = 5;
  s.directory_syncs = 2;
  return s;
}

Scenario RemoveShards() {
  const Weights w;
  Scenario s{.label = "RemoveShards", .start = Chain(w)};
  {
    CrashFileSystem files(s.start);
    Must(SaveTestSnapshot(files, "/s/sharded", w.two,
                          {.shard_bytes = kTwoShards}));
    s.start = files.Latest();
  }
  s.run = [](FileSystem& files) {
    return RemoveSnapshot(files, "/s", "sharded");
  };
  s.expected = {{"/s", "base", w.base.File()},
                {"/s", "one", w.one.File()},
                {"/s", "sharded", w.two.File(), Expected::kGoing}};
  s.directory_syncs = 1;
  return s;
}

class SnapshotCrashTest : public testing::TestWithParam<Scenario (*)()> {
 protected:
  const Scenario scenario_ = GetParam()();
};

INSTANTIATE_TEST_SUITE_P(All, SnapshotCrashTest,
                         testing::Values(&SaveBase, &SaveShards, &SaveDelta,
                                         &SaveDeltaToShards, &Remove,
                                         &RemoveShards, &RemoveParent, &Collect,
                                         &Promote, &PromoteShards),
                         [](const auto& info) { return info.param().label; });

TEST_P(SnapshotCrashTest, ThePowerFailsAtAnyTime) {
  for (const int64_t page_bytes : {64, 512}) {
    CrashFileSystem files(scenario_.start, page_bytes);
    int64_t disks = 0;
    EXPECT_EQ(scenario_.CheckAnyPowerLoss(files, 100, &disks), "");
    EXPECT_GT(disks, 5);
    RecordProperty("disks_" + std::to_string(page_bytes),
                   std::to_string(disks));
  }
}

TEST_P(SnapshotCrashTest, AnyCallFails) {
  int64_t faults = 0, disks = 0;
  std::mt19937 random(1);
  for (const Fault fault : kFaults) {
    for (int64_t call = 1;; ++call) {
      SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)) +
                   " at call " + std::to_string(call));
      CrashFileSystem files(scenario_.start, kPageBytes);
      files.FailAt(call, fault);
      const bool done = scenario_.run(files).ok();
      if (call > files.calls()) break;
      if (files.faults() == 0) {
        ASSERT_TRUE(done);
        continue;
      }
      ++faults;
      // What a power loss leaves of it.
      const int64_t end = files.num_events();
      for (int i = 0; i < 3; ++i) {
        const int64_t event =
            i == 0 ? end : static_cast<int64_t>(random()) % (end + 1);
        ASSERT_EQ(scenario_.CheckPowerLoss(files, event, 10,
                                           done && event == end, &disks),
                  "");
      }
      // The next process finds what was written, and does it again.
      files.Revive();
      ASSERT_TRUE(RecoverSnapshots(files, "/s").ok());
      ASSERT_TRUE(RecoverSnapshots(files, "/m").ok());
      ASSERT_EQ(scenario_.Check(files.Latest(), done), "");
      for (const std::string& name : files.Latest().directories) {
        ASSERT_EQ(name.find("/."), std::string::npos) << name;
      }
      const absl::Status again = scenario_.run(files);
      ASSERT_TRUE(again.ok() || ReasonOf(again) == "CHECKPOINT_NOT_FOUND" ||
                  ReasonOf(again) == "DELTA_PARENT_UNAVAILABLE")
          << again;
      ASSERT_EQ(scenario_.CheckPowerLoss(files, files.num_events(), 10,
                                         again.ok(), &disks),
                "");
    }
  }
  EXPECT_GT(faults, 10);
  EXPECT_GT(disks, 30);
  RecordProperty("faults", std::to_string(faults));
}

// That the tests above see what they should.

bool IsCaught(const Scenario& scenario, Lie lie, int64_t call) {
  CrashFileSystem files(scenario.start, kPageBytes);
  files.TellLie(lie, call);
  int64_t disks = 0;
  return !scenario.CheckAnyPowerLoss(files, 200, &disks).empty();
}

TEST_P(SnapshotCrashTest, NoKindOfSyncMayBeLeftOut) {
  EXPECT_FALSE(IsCaught(scenario_, Lie::kNone, 0));
  if (scenario_.syncs > 0) {
    EXPECT_TRUE(IsCaught(scenario_, Lie::kSync, 0));
    EXPECT_TRUE(IsCaught(scenario_, Lie::kSyncBeforeRename, 0));
  }
  if (scenario_.directory_syncs > 0) {
    EXPECT_TRUE(IsCaught(scenario_, Lie::kSyncDirectory, 0));
  }
}

TEST_P(SnapshotCrashTest, EachSyncOfASaveIsNeeded) {
  if (scenario_.syncs == 0) GTEST_SKIP() << "it writes no files";
  CrashFileSystem honest(scenario_.start, kPageBytes);
  ASSERT_TRUE(scenario_.run(honest).ok());
  for (const auto& [lie, expected] :
       {std::pair(Lie::kSync, scenario_.syncs),
        std::pair(Lie::kSyncDirectory, scenario_.directory_syncs)}) {
    int syncs = 0;
    for (int64_t call = 1; call <= honest.calls(); ++call) {
      CrashFileSystem files(scenario_.start, kPageBytes);
      files.TellLie(lie, call);
      ASSERT_TRUE(scenario_.run(files).ok());
      if (files.num_events() == honest.num_events()) continue;
      ++syncs;
      EXPECT_TRUE(IsCaught(scenario_, lie, call))
          << static_cast<int>(lie) << " at call " << call;
    }
    EXPECT_EQ(syncs, expected);
  }
}

}  // namespace
}  // namespace gradwire
