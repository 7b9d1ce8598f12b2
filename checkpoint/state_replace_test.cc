// SPDX-License-Identifier: Apache-2.0
// A checkpoint takes the place of another one, and is interrupted in every way:
// one of the two is there, whole. And a checkpoint that was given a second
// place keeps it, whatever becomes of the first.
#include <gtest/gtest.h>

#include <functional>

#include "checkpoint/crash_file_system.h"
#include "checkpoint/state_testing.h"
#include "checkpoint/training_state.h"

namespace gradwire {
namespace {

using Fault = CrashFileSystem::Fault;
using Lie = CrashFileSystem::Lie;

constexpr Fault kFaults[] = {Fault::kKill, Fault::kNoSpace, Fault::kIoError,
                             Fault::kShortWrite};
constexpr int64_t kPageBytes = 512;
constexpr int64_t kChunkBytes = 48;

// What is wrong with "/s/best", which must be one of these; "" if nothing.
std::string IsOneOf(const DiskImage& image,
                    const std::vector<const TestState*>& states) {
  std::string wrong;
  for (const TestState* state : states) {
    CrashFileSystem files(image);
    absl::Status status;
    const std::string why = Compare(files, "/s/best", *state, &status);
    if (why.empty()) return "";
    wrong += why + "; ";
  }
  return wrong;
}

// Of what the start of a process makes of it.
std::string IsOneOfAfterStart(const DiskImage& image,
                              const std::vector<const TestState*>& states) {
  CrashFileSystem files(image);
  const absl::Status swept = RemoveLeftovers(files, "/s");
  if (!swept.ok()) return swept.ToString();
  std::string wrong = IsOneOf(files.Latest(), states);
  files.ForEachPowerLoss(files.num_events(), 30, 1, [&](const DiskImage& left) {
    if (wrong.empty()) wrong = IsOneOf(left, states);
  });
  const auto names = files.List("/s");
  for (const std::string& name : *names) {
    if (name.starts_with('.')) wrong += name + " is left";
  }
  return wrong;
}

class Replace : public testing::TestWithParam<bool> {
 protected:
  // With a checkpoint, and what an earlier process has left.
  Replace() {
    CrashFileSystem files({.files = {}, .directories = {"/s"}}, kPageBytes);
    EXPECT_TRUE(Save(files, "/s/best", old_, DealPieces(old_, 3, 1), 64).ok());
    clean_ = files.Latest();
    start_ = clean_;
    start_.directories.insert("/s/.best.pending");
    start_.files["/s/.best.pending/rank-00000.data"] = "left";
  }

  bool exchanges() const { return GetParam(); }

  std::unique_ptr<CrashFileSystem> Files(const DiskImage& image) const {
    auto files = std::make_unique<CrashFileSystem>(image, kPageBytes);
    files->set_can_exchange(exchanges());
    return files;
  }

  absl::Status Run(FileSystem& files, const TestState& state) const {
    return Save(files, "/s/best", state, DealPieces(state, 2, 2), kChunkBytes,
                /*replaces=*/true)
        .status();
  }

  // Without an exchange there is a moment that only a start can mend.
  std::string Check(const DiskImage& image,
                    const std::vector<const TestState*>& states) const {
    if (exchanges()) {
      const std::string wrong = IsOneOf(image, states);
      if (!wrong.empty()) return wrong;
    }
    return IsOneOfAfterStart(image, states);
  }

  std::string CheckPowerLoss(
      const CrashFileSystem& files, int64_t event, int64_t limit,
      const std::vector<const TestState*>& states) const {
    std::string wrong;
    files.ForEachPowerLoss(event, limit, static_cast<uint64_t>(event),
                           [&](const DiskImage& image) {
                             if (wrong.empty()) wrong = Check(image, states);
                           });
    return wrong;
  }

  std::string CheckAnyPowerLoss(CrashFileSystem& files) const {
    const absl::Status saved = Run(files, new_);
    if (!saved.ok()) return saved.ToString();
    const int64_t end = files.num_events();
    // What comes after the sync only removes the old one.
    std::string wrong = CheckPowerLoss(files, end, 100, {&new_});
    for (int64_t event = end; event >= 0 && wrong.empty(); --event) {
      wrong = CheckPowerLoss(files, event, 100, {&old_, &new_});
    }
    return wrong;
  }

  const TestState old_ = MakeState(19, 1, std::nullopt);
  const TestState new_ = MakeState(29, 2, DType::kBF16);
  const TestState third_ = MakeState(23, 3, DType::kF32);
  DiskImage clean_, start_;
};

INSTANTIATE_TEST_SUITE_P(, Replace, testing::Bool(), [](const auto& info) {
  return info.param ? "Exchanges" : "InTwoSteps";
});

TEST_P(Replace, TakesThePlace) {
  for (const DiskImage& start : {clean_, start_}) {
    const auto files = Files(start);
    EXPECT_EQ(ReasonOf(Save(*files, "/s/best", new_, DealPieces(new_, 2, 2),
                            kChunkBytes)
                           .status()),
              "CHECKPOINT_EXISTS");
    ASSERT_TRUE(Run(*files, new_).ok());
    EXPECT_EQ(IsOneOf(files->Latest(), {&new_}), "");
    EXPECT_EQ(files->List("/s").value(), std::vector<std::string>{"best"});
    // Where there is none, it is as a save that does not replace.
    ASSERT_TRUE(RemoveState(*files, "/s/best").ok());
    ASSERT_TRUE(Run(*files, third_).ok());
    EXPECT_EQ(IsOneOf(files->Latest(), {&third_}), "");
  }
}

TEST_P(Replace, AnAbandonedOneChangesNothing) {
  const auto files = Files(start_);
  {
    auto pending = PendingState::Create(*files, "/s/best", true);
    ASSERT_TRUE(pending.ok());
    EXPECT_EQ(ReasonOf(pending->Publish(new_.header, 2).status()),
              "STATE_PIECES_INVALID");
  }
  EXPECT_EQ(files->Latest(), clean_);
}

// It was deleted while the new one was written.
TEST_P(Replace, TheOldOneMayGo) {
  const auto files = Files(clean_);
  auto pending = PendingState::Create(*files, "/s/best", true);
  ASSERT_TRUE(pending.ok());
  const auto pieces = DealPieces(new_, 2, 2);
  for (int rank = 0; rank < 2; ++rank) {
    ASSERT_TRUE(WriteRank(*files, pending->path(), new_, rank,
                          pieces[static_cast<size_t>(rank)], kChunkBytes)
                    .ok());
  }
  ASSERT_TRUE(RemoveState(*files, "/s/best").ok());
  ASSERT_TRUE(pending->Publish(new_.header, 2).ok());
  EXPECT_EQ(IsOneOf(files->Latest(), {&new_}), "");
}

TEST_P(Replace, ThePowerFailsAtAnyTime) {
  for (const DiskImage& start : {clean_, start_}) {
    const auto files = Files(start);
    EXPECT_EQ(CheckAnyPowerLoss(*files), "");
  }
}

TEST_P(Replace, AnyCallFails) {
  int64_t faults = 0, replaced = 0;
  for (const Fault fault : kFaults) {
    for (int64_t call = 1;; ++call) {
      SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)) +
                   " at call " + std::to_string(call));
      const auto files = Files(start_);
      files->FailAt(call, fault);
      const bool saved = Run(*files, new_).ok();
      if (call > files->calls()) break;
      if (files->faults() == 0) continue;
      ++faults;
      // That the old one's files cannot be removed is nobody's failure.
      const DiskImage now = files->Latest();
      ASSERT_EQ(Check(now, {&old_, &new_}), "");
      const bool is_new = IsOneOf(now, {&new_}).empty();
      ASSERT_TRUE(is_new || !saved);
      replaced += is_new ? 1 : 0;
      for (int64_t event = files->num_events(); event >= 0; event -= 37) {
        ASSERT_EQ(CheckPowerLoss(*files, event, 10, {&old_, &new_}), "");
      }
      // Tried again, by the same process or the next one.
      if (fault == Fault::kKill) {
        files->Revive();
        ASSERT_TRUE(RemoveLeftovers(*files, "/s").ok());
        ASSERT_EQ(CheckPowerLoss(*files, files->num_events(), 30,
                                 {is_new ? &new_ : &old_}),
                  "");
      }
      ASSERT_TRUE(Run(*files, third_).ok());
      const int64_t end = files->num_events();
      ASSERT_EQ(CheckPowerLoss(*files, end, 10, {&third_}), "");
      for (int64_t event = end; event >= 0; event -= 41) {
        ASSERT_EQ(CheckPowerLoss(*files, event, 10, {&old_, &new_, &third_}),
                  "");
      }
    }
  }
  EXPECT_GT(faults, 100);
  EXPECT_GT(replaced, 2);
}

// The start after a kill is killed as well.
TEST_P(Replace, AnyCallOfAStartFails) {
  int64_t faults = 0;
  for (int64_t call = 1;; ++call) {
    const auto killed = Files(start_);
    killed->FailAt(call, Fault::kKill);
    (void)Run(*killed, new_);
    if (call > killed->calls()) break;
    for (int64_t at = 1;; ++at) {
      SCOPED_TRACE(std::to_string(call) + ", start " + std::to_string(at));
      const auto files = Files(killed->Latest());
      files->FailAt(at, Fault::kKill);
      (void)RemoveLeftovers(*files, "/s");
      if (at > files->calls()) break;
      ++faults;
      ASSERT_EQ(Check(files->Latest(), {&old_, &new_}), "");
      ASSERT_EQ(CheckPowerLoss(*files, files->num_events(), 30, {&old_, &new_}),
                "");
    }
  }
  EXPECT_GT(faults, 100);
}

TEST_P(Replace, EachSyncIsNeeded) {
  const auto honest = Files(clean_);
  ASSERT_EQ(CheckAnyPowerLoss(*honest), "");
  for (const auto& [lie, expected] :
       {std::pair(Lie::kSync, 5), std::pair(Lie::kSyncDirectory, 2)}) {
    int syncs = 0;
    for (int64_t call = 1; call <= honest->calls(); ++call) {
      const auto tried = Files(clean_);
      tried->TellLie(lie, call);
      ASSERT_TRUE(Run(*tried, new_).ok());
      if (tried->num_events() == honest->num_events()) continue;
      ++syncs;
      const auto files = Files(clean_);
      files->TellLie(lie, call);
      EXPECT_NE(CheckAnyPowerLoss(*files), "")
          << static_cast<int>(lie) << " at call " << call;
    }
    EXPECT_EQ(syncs, expected);
  }
}

// What a failed sync has left is not removed before it is synced.
TEST_P(Replace, ALeftoverMayBeTheOnlyOne) {
  const auto files = Files(clean_);
  // Where the new one has taken its name, and the sync fails.
  int64_t call = 1;
  const auto count = Files(clean_);
  ASSERT_TRUE(Run(*count, new_).ok());
  for (call = count->calls(); call > 0; --call) {
    const auto tried = Files(clean_);
    tried->FailAt(call, Fault::kIoError);
    if (!Run(*tried, new_).ok()) break;
  }
  files->FailAt(call, Fault::kIoError);
  ASSERT_EQ(ReasonOf(Run(*files, new_)), "STORAGE_IO");
  ASSERT_EQ(IsOneOf(files->Latest(), {&new_}), "");
  // A power loss brings the old one back, or not; and so while the next save
  // clears the way for itself.
  for (const bool honest : {true, false}) {
    const auto next = Files(files->Latest());
    // It begins on the disk where the old one was not yet replaced.
    const auto again = Files(clean_);
    again->FailAt(call, Fault::kIoError);
    ASSERT_FALSE(Run(*again, new_).ok());
    const int64_t begin = again->num_events();
    if (!honest) again->TellLie(Lie::kSyncDirectory);
    ASSERT_TRUE(Run(*again, third_).ok());
    std::string wrong;
    for (int64_t event = begin; event <= again->num_events(); ++event) {
      const std::string here =
          CheckPowerLoss(*again, event, 20, {&old_, &new_, &third_});
      if (wrong.empty()) wrong = here;
    }
    EXPECT_EQ(wrong.empty(), honest) << wrong;
  }
}

// ---- Links ----

class Link : public testing::Test {
 protected:
  Link() {
    CrashFileSystem files({.files = {}, .directories = {"/s"}}, kPageBytes);
    EXPECT_TRUE(Save(files, "/s/best", one_, DealPieces(one_, 3, 1), 64).ok());
    start_ = files.Latest();
  }

  static std::string At(FileSystem& files, const std::string& path,
                        const TestState& state) {
    absl::Status status;
    return Compare(files, path, state, &status);
  }

  absl::Status Replace(FileSystem& files, const TestState& state) const {
    return Save(files, "/s/best", state, DealPieces(state, 3, 2), kChunkBytes,
                true)
        .status();
  }

  const TestState one_ = MakeState(29, 2, DType::kBF16);
  const TestState two_ = MakeState(29, 3, DType::kBF16);
  const TestState three_ = MakeState(29, 4, DType::kBF16);
  DiskImage start_;
};

TEST_F(Link, StaysWhenTheFirstGoes) {
  CrashFileSystem files(start_);
  EXPECT_EQ(LinkState(files, "/s/best", "/kept/1/best").value(), true);
  ASSERT_TRUE(Replace(files, two_).ok());
  EXPECT_EQ(At(files, "/kept/1/best", one_), "");
  // There is one already.
  EXPECT_EQ(LinkState(files, "/s/best", "/kept/1/best").value(), true);
  EXPECT_EQ(At(files, "/kept/1/best", one_), "");
  ASSERT_TRUE(RemoveState(files, "/s/best").ok());
  EXPECT_EQ(At(files, "/kept/1/best", one_), "");
  EXPECT_EQ(ReasonOf(LinkState(files, "/s/best", "/kept/2/best").status()),
            "CHECKPOINT_NOT_FOUND");
  EXPECT_FALSE(files.Stat("/kept/2").ok());
  ASSERT_TRUE(RemoveState(files, "/kept/1/best").ok());
  EXPECT_EQ(files.Latest().files.size(), 0u);
}

TEST_F(Link, OnTheMachinesFiles) {
  const std::string best = testing::TempDir() + "/link/best";
  const std::string kept = testing::TempDir() + "/link/kept/best";
  FileSystem& files = PosixFileSystem();
  ASSERT_TRUE(MakeDirectories(files, testing::TempDir() + "/link").ok());
  const auto pieces = DealPieces(one_, 2, 1);
  ASSERT_TRUE(Save(files, best, one_, pieces, 64).ok());
  ASSERT_EQ(LinkState(files, best, kept).value(), true);
  ASSERT_TRUE(Save(files, best, two_, pieces, 64, true).ok());
  EXPECT_EQ(At(files, best, two_), "");
  EXPECT_EQ(At(files, kept, one_), "");
  EXPECT_EQ(files.List(testing::TempDir() + "/link").value(),
            (std::vector<std::string>{"best", "kept"}));
}

TEST_F(Link, SaysThatItCannot) {
  CrashFileSystem files(start_);
  files.set_can_link(false);
  EXPECT_EQ(LinkState(files, "/s/best", "/kept/best").value(), false);
  EXPECT_EQ(files.Latest().files, start_.files);
}

TEST_F(Link, ADamagedOneIsLinkedAsItIs) {
  DiskImage image = start_;
  image.files.erase("/s/best/manifest.json");
  CrashFileSystem files(image);
  EXPECT_EQ(LinkState(files, "/s/best", "/kept/best").value(), true);
  EXPECT_EQ(ReasonOf(StateReader::Open(files, "/kept/best").status()),
            "CHECKPOINT_CORRUPT");
}

TEST_F(Link, AnyCallFails) {
  int64_t faults = 0;
  for (const Fault fault : {Fault::kKill, Fault::kNoSpace, Fault::kIoError}) {
    for (int64_t call = 1;; ++call) {
      SCOPED_TRACE("call " + std::to_string(call));
      CrashFileSystem files(start_, kPageBytes);
      files.FailAt(call, fault);
      const bool linked = LinkState(files, "/s/best", "/kept/best").ok();
      if (call > files.calls()) break;
      if (files.faults() == 0) continue;
      ++faults;
      // Not every look matters.
      ASSERT_TRUE(!linked || fault == Fault::kIoError);
      // Nothing, or all of it; and all of it again.
      files.Revive();
      if (files.Stat("/kept/best").ok()) {
        EXPECT_EQ(At(files, "/kept/best", one_), "");
      }
      ASSERT_EQ(LinkState(files, "/s/best", "/kept/best").value(), true);
      EXPECT_EQ(At(files, "/kept/best", one_), "");
      EXPECT_EQ(files.List("/kept").value(), std::vector<std::string>{"best"});
      EXPECT_EQ(At(files, "/s/best", one_), "");
    }
  }
  EXPECT_GT(faults, 30);
}

// What is wrong after a power loss when LinkState has said OK; its syncs lie as
// they are told to.
TEST_F(Link, OutlastsAPowerLoss) {
  const auto check = [&](Lie lie) {
    CrashFileSystem files(start_, kPageBytes);
    files.TellLie(lie);
    EXPECT_EQ(LinkState(files, "/s/best", "/kept/best").value(), true);
    std::string wrong;
    const auto visit = [&](const DiskImage& image) {
      CrashFileSystem left(image);
      const std::string here = At(left, "/kept/best", one_);
      if (wrong.empty()) wrong = here;
    };
    files.ForEachPowerLoss(files.num_events(), 500, 1, visit);
    return wrong;
  };
  EXPECT_EQ(check(Lie::kNone), "");
  EXPECT_NE(check(Lie::kSyncDirectory), "");
  EXPECT_NE(check(Lie::kSyncBeforeRename), "");
}

// ---- Beside a reader ----

// Calls back before a chosen call that looks something up.
class Watched : public CrashFileSystem {
 public:
  using CrashFileSystem::CrashFileSystem;
  void Before(int64_t call, std::function<void()> then) {
    call_ = call;
    then_ = std::move(then);
  }
  int64_t seen() const { return seen_; }

 protected:
  int CallOpen(const std::string& path, Access access,
               std::unique_ptr<File>* file) override {
    Count();
    return CrashFileSystem::CallOpen(path, access, file);
  }
  int CallList(const std::string& path,
               std::vector<std::string>* names) override {
    Count();
    return CrashFileSystem::CallList(path, names);
  }
  int CallStat(const std::string& path, Info* info) override {
    Count();
    return CrashFileSystem::CallStat(path, info);
  }
  int CallLink(const std::string& file, const std::string& name) override {
    Count();
    return CrashFileSystem::CallLink(file, name);
  }

 private:
  void Count() {
    if (++seen_ != call_) return;
    const auto then = std::move(then_);
    then();
  }
  int64_t seen_ = 0, call_ = 0;
  std::function<void()> then_;
};

TEST_F(Link, IsOfOneCheckpointIfItIsReplacedMeanwhile) {
  int64_t times = 0, old = 0;
  for (int64_t call = 1;; ++call) {
    Watched files(start_);
    bool done = false;
    files.Before(call, [&] {
      done = true;
      ASSERT_TRUE(Replace(files, two_).ok());
    });
    const auto linked = LinkState(files, "/s/best", "/kept/best");
    if (!done) break;
    ++times;
    ASSERT_TRUE(linked.ok()) << linked.status();
    const bool is_old = At(files, "/kept/best", one_).empty();
    old += is_old ? 1 : 0;
    ASSERT_TRUE(is_old || At(files, "/kept/best", two_).empty()) << call;
  }
  EXPECT_GT(times, 10);
  EXPECT_GT(old, 0);
  EXPECT_LT(old, times);
}

TEST_F(Link, AReaderReadsOneCheckpointIfItIsReplacedMeanwhile) {
  int64_t times = 0, refused = 0;
  for (int64_t call = 1;; ++call) {
    Watched files(start_);
    bool done = false;
    files.Before(call, [&] {
      done = true;
      ASSERT_TRUE(Replace(files, two_).ok());
      // Or twice.
      if (call % 2 == 0) {
        ASSERT_TRUE(Replace(files, three_).ok());
      }
    });
    absl::Status status;
    std::string wrong = Compare(files, "/s/best", one_, &status);
    if (!done) break;
    ++times;
    const TestState& now = call % 2 == 0 ? three_ : two_;
    if (ReasonOf(status) == "CHECKPOINT_REPLACED") {
      ++refused;
      wrong = At(files, "/s/best", now);
    } else if (!wrong.empty()) {
      ASSERT_TRUE(status.ok()) << call << " " << status;
      // Read again, as Compare has stopped at what differs.
      wrong = At(files, "/s/best", now);
    }
    ASSERT_EQ(wrong, "") << call;
  }
  EXPECT_GT(times, 10);
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace gradwire
