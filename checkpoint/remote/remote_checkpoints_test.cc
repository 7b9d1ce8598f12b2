// SPDX-License-Identifier: Apache-2.0
// Copies in an object store, interrupted at every call: each is there whole, or
// not at all, and what is left over goes.
#include "checkpoint/remote/remote_checkpoints.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"
#include "checkpoint/crash_file_system.h"
#include "checkpoint/remote/memory_object_store.h"

namespace gradwire {
namespace {

using Disk = CrashFileSystem::Fault;
using Store = MemoryObjectStore::Fault;

constexpr char kKey[] = "jobs/j/checkpoints/a";
constexpr char kFrom[] = "/s/a";
constexpr char kServer[] = "0123456789ab";

std::string Reason(const absl::Status& status) {
  const auto detail = GetErrorDetail(status);
  return detail ? detail->reason : "";
}

DiskImage Published() {
  return {.files = {{"/s/a/data", "some weights"},
                    {"/s/a/manifest.json", "{}"},
                    {"/s/a/empty", ""}},
          .directories = {"/s", "/s/a", "/t"}};
}

class RemoteTest : public testing::Test {
 protected:
  absl::Status StoreIt(FileSystem& files, int64_t epoch,
                       const std::string& digest = "d") {
    RemoteCheckpoints remote(store_, files, kServer, epoch);
    return remote
        .Store(kKey, {.directory = kFrom,
                      .digest = digest,
                      .parent = "",
                      .created_micros = 7})
        .status();
  }
  // "" if what is in the store can be fetched, and is what was on the disk, or
  // if there is nothing.
  std::string Wrong(bool may_be_absent) {
    store_.FailAt(0, Store::kUnreachable);
    CrashFileSystem files(Published());
    RemoteCheckpoints remote(store_, files, kServer, 99);
    const auto fetched = remote.Fetch(kKey, "/t/a");
    if (!fetched.ok()) {
      const bool absent =
          Reason(fetched.status()) == "REMOTE_CHECKPOINT_NOT_FOUND";
      return absent && may_be_absent ? "" : fetched.status().ToString();
    }
    const DiskImage image = files.Latest();
    for (const char* name : {"data", "manifest.json", "empty"}) {
      const auto file = image.files.find(std::string("/t/a/") + name);
      if (file == image.files.end()) return std::string(name) + " is missing";
      if (file->second != Published().files.at(std::string("/s/a/") + name)) {
        return std::string(name) + " differs";
      }
    }
    return "";
  }
  int64_t CountFolders() {
    std::set<std::string> folders;
    for (const auto& [key, content] : store_.objects) {
      if (!key.ends_with("commit.json")) {
        folders.insert(key.substr(0, key.rfind('/')));
      }
    }
    return std::ssize(folders);
  }

  MemoryObjectStore store_;
};

TEST_F(RemoteTest, WhatIsStoredComesBack) {
  CrashFileSystem files(Published());
  ASSERT_TRUE(StoreIt(files, 1).ok());
  EXPECT_EQ(Wrong(false), "");
  RemoteCheckpoints remote(store_, files, kServer, 1);
  EXPECT_EQ(remote.ListNames("jobs/j/checkpoints")->at(0), "a");
  const auto commit = remote.Find(kKey);
  EXPECT_EQ((*commit)->digest, "d");
  EXPECT_EQ((*commit)->bytes(), 14);
  EXPECT_EQ((*commit)->created_micros, 7);
  EXPECT_TRUE(remote.Remove(kKey).ok());
  EXPECT_TRUE(store_.objects.empty());
  EXPECT_EQ(Reason(remote.Fetch(kKey, "/t/b").status()),
            "REMOTE_CHECKPOINT_NOT_FOUND");
}

TEST_F(RemoteTest, TheSameAgainIsAsGoodAndAnotherIsRefused) {
  CrashFileSystem files(Published());
  ASSERT_TRUE(StoreIt(files, 1).ok());
  const auto before = store_.objects;
  EXPECT_TRUE(StoreIt(files, 2).ok());
  EXPECT_EQ(Reason(StoreIt(files, 2, "other")), "REMOTE_CHECKPOINT_EXISTS");
  EXPECT_EQ(store_.objects, before);
}

TEST_F(RemoteTest, AStoreThatFailsAnywhereLeavesAllOrNothing) {
  for (const Store fault :
       {Store::kUnreachable, Store::kAnswerLost, Store::kDead}) {
    int64_t call = 0, failures = 0;
    for (bool done = false; !done;) {
      store_ = MemoryObjectStore();
      CrashFileSystem files(Published());
      store_.FailAt(++call, fault);
      const absl::Status stored = StoreIt(files, 1);
      done = store_.calls() < call;
      failures += stored.ok() ? 0 : 1;
      ASSERT_EQ(Wrong(!stored.ok()), "") << call;
      // Another try in this life adds nothing to what a failed one has left.
      if (fault != Store::kDead) {
        ASSERT_TRUE(StoreIt(files, 1).ok()) << call;
        ASSERT_EQ(CountFolders(), 1) << call;
        ASSERT_TRUE(store_.uploads.empty()) << call;
      }
      // The next life puts it there, and nothing else is left.
      RemoteCheckpoints next(store_, files, kServer, 2);
      ASSERT_TRUE(next.Sweep(kKey).ok());
      ASSERT_TRUE(StoreIt(files, 2).ok()) << call;
      ASSERT_EQ(Wrong(false), "") << call;
      ASSERT_EQ(CountFolders(), 1) << call;
      ASSERT_TRUE(store_.uploads.empty()) << call;
    }
    EXPECT_GE(failures, 4);
  }
}

// Another checkpoint under the same name.
class RemoteReplaceTest : public RemoteTest {
 protected:
  static DiskImage Replaced() {
    DiskImage image = Published();
    image.files["/s/a/data"] = "newer weights";
    return image;
  }
  absl::Status ReplaceIt(
      int64_t epoch, const std::string& server = kServer,
      const std::function<absl::Status()>& check = [] {
        return absl::OkStatus();
      }) {
    CrashFileSystem files(Replaced());
    RemoteCheckpoints remote(store_, files, server, epoch);
    return remote
        .Store(kKey, {.directory = kFrom,
                      .digest = "newer",
                      .parent = "",
                      .created_micros = 8,
                      .replaces = true,
                      .check = check})
        .status();
  }
  // What is fetched; "" if nothing can be.
  std::string Fetched() {
    store_.FailAt(0, Store::kUnreachable);
    CrashFileSystem files({.files = {}, .directories = {"/t"}});
    RemoteCheckpoints remote(store_, files, kServer, 99);
    if (!remote.Fetch(kKey, "/t/a").ok()) return "";
    return files.Latest().files.at("/t/a/data");
  }
};

TEST_F(RemoteReplaceTest, AServerReplacesItsOwn) {
  CrashFileSystem files(Published());
  ASSERT_TRUE(StoreIt(files, 2).ok());
  EXPECT_EQ(Reason(ReplaceIt(3, "ba9876543210")), "REMOTE_CHECKPOINT_EXISTS");
  // An earlier life does not know better.
  EXPECT_EQ(Reason(ReplaceIt(1)), "REMOTE_CHECKPOINT_EXISTS");
  EXPECT_EQ(Fetched(), "some weights");
  for (const int64_t epoch : {2, 2, 3}) {
    EXPECT_TRUE(ReplaceIt(epoch).ok());
    EXPECT_EQ(Fetched(), "newer weights");
    EXPECT_EQ(CountFolders(), 1);
    EXPECT_EQ(store_.objects.size(), 4u);
  }
}

TEST_F(RemoteReplaceTest, OneThatFailsAnywhereLeavesTheOneOrTheOther) {
  for (const Store fault :
       {Store::kUnreachable, Store::kAnswerLost, Store::kDead}) {
    int64_t call = 0, failures = 0, old = 0;
    for (bool done = false; !done;) {
      store_ = MemoryObjectStore();
      CrashFileSystem files(Published());
      ASSERT_TRUE(StoreIt(files, 1).ok());
      store_.FailAt(++call, fault);
      const absl::Status replaced = ReplaceIt(1);
      done = store_.calls() < call;
      failures += replaced.ok() ? 0 : 1;
      const std::string now = Fetched();
      ASSERT_TRUE(now == "newer weights" ||
                  (now == "some weights" && !replaced.ok()))
          << call << now;
      old += now == "some weights" ? 1 : 0;
      if (fault != Store::kDead) {
        ASSERT_TRUE(ReplaceIt(1).ok()) << call;
        ASSERT_EQ(Fetched(), "newer weights") << call;
      }
      CrashFileSystem again(Replaced());
      RemoteCheckpoints next(store_, again, kServer, 2);
      ASSERT_TRUE(next.Sweep(kKey).ok());
      ASSERT_TRUE(ReplaceIt(2).ok()) << call;
      ASSERT_EQ(Fetched(), "newer weights") << call;
      ASSERT_EQ(CountFolders(), 1) << call;
      ASSERT_TRUE(store_.uploads.empty()) << call;
    }
    EXPECT_GE(failures, 4);
    EXPECT_GE(old, 4);
  }
}

// The store may take a commit after nobody has waited for its answer any more.
TEST_F(RemoteReplaceTest, ACommitWithoutAnAnswerKeepsItsFiles) {
  CrashFileSystem files(Published());
  // A look, three files in two requests each, the commit.
  constexpr int64_t kCommitCall = 8;
  ASSERT_TRUE(StoreIt(files, 1).ok());
  const auto before = store_.objects;
  store_.FailAt(kCommitCall, Store::kUnreachable);
  EXPECT_EQ(Reason(ReplaceIt(1)), "STORAGE_UNREACHABLE");
  EXPECT_EQ(CountFolders(), 2);
  // All of what it names is there.
  EXPECT_EQ(store_.objects.size(), before.size() + 3);
  EXPECT_EQ(Fetched(), "some weights");
  EXPECT_TRUE(ReplaceIt(1).ok());
  EXPECT_EQ(CountFolders(), 1);
}

TEST_F(RemoteReplaceTest, WhatHasChangedMeanwhileIsNotCommitted) {
  CrashFileSystem files(Published());
  const auto changed = [] { return absl::AbortedError("changed"); };
  EXPECT_TRUE(absl::IsAborted(ReplaceIt(1, kServer, changed)));
  EXPECT_TRUE(store_.objects.empty());
  ASSERT_TRUE(StoreIt(files, 1).ok());
  const auto before = store_.objects;
  EXPECT_TRUE(absl::IsAborted(ReplaceIt(1, kServer, changed)));
  EXPECT_EQ(store_.objects, before);
}

// Two tries at once: the second one finds that the first has come before it.
TEST_F(RemoteReplaceTest, WhatWasReplacedSinceItWasSeenStays) {
  CrashFileSystem files(Published());
  ASSERT_TRUE(StoreIt(files, 1).ok());
  const auto other = [&]() -> absl::Status {
    CrashFileSystem theirs(Published());
    RemoteCheckpoints remote(store_, theirs, kServer, 1);
    return remote
        .Store(kKey, {.directory = kFrom,
                      .digest = "third",
                      .parent = "",
                      .created_micros = 9,
                      .replaces = true})
        .status();
  };
  EXPECT_EQ(Reason(ReplaceIt(1, kServer, other)), "REMOTE_CHECKPOINT_EXISTS");
  RemoteCheckpoints remote(store_, files, kServer, 1);
  EXPECT_EQ((*remote.Find(kKey))->digest, "third");
  EXPECT_EQ(Fetched(), "some weights");
  EXPECT_EQ(CountFolders(), 1);
}

// The store's files of a checkpoint are gone once another one is there.
TEST_F(RemoteReplaceTest, AFetchBeginsAgain) {
  CrashFileSystem from(Published());
  ASSERT_TRUE(StoreIt(from, 1).ok());
  int64_t times = 0;
  for (bool done = false; !done;) {
    store_ = MemoryObjectStore();
    ASSERT_TRUE(StoreIt(from, 1).ok());
    ++times;
    bool replaced = false;
    store_.BeforeCall(times, [&] {
      replaced = true;
      ASSERT_TRUE(ReplaceIt(1).ok());
    });
    CrashFileSystem files({.files = {}, .directories = {"/t"}});
    RemoteCheckpoints remote(store_, files, kServer, 1);
    const auto fetched = remote.Fetch(kKey, "/t/a");
    done = !replaced;
    ASSERT_TRUE(fetched.ok()) << times << fetched.status();
    const std::string data = files.Latest().files.at("/t/a/data");
    ASSERT_TRUE(data == "some weights" || data == "newer weights");
  }
  EXPECT_GT(times, 3);
}

TEST_F(RemoteTest, AnotherServersBeginningsStay) {
  const std::string theirs = std::string(kKey) + "/ba9876543210-1-0000/data";
  const std::string newer = std::string(kKey) + "/0123456789ab-5-0000/data";
  const std::string strange = std::string(kKey) + "/0123456789ab-x/data";
  for (const std::string& key : {theirs, newer, strange}) {
    store_.objects[key] = "x";
    store_.uploads.insert(key);
  }
  const std::string left = std::string(kKey) + "/0123456789ab-4-0000/data";
  store_.objects[left] = "x";
  store_.uploads.insert(left);
  CrashFileSystem files(Published());
  RemoteCheckpoints remote(store_, files, kServer, 5);
  ASSERT_TRUE(remote.Sweep(kKey).ok());
  EXPECT_EQ(store_.objects.count(left) + store_.uploads.count(left), 0u);
  EXPECT_EQ(store_.objects.size(), 3u);
  EXPECT_EQ(store_.uploads.size(), 3u);
}

TEST_F(RemoteTest, AFetchThatFailsAnywhereLeavesNothing) {
  CrashFileSystem from(Published());
  ASSERT_TRUE(StoreIt(from, 1).ok());
  const auto check = [&](CrashFileSystem& files, const absl::Status& fetched) {
    files.Revive();
    if (fetched.ok()) {
      // And it outlasts a power loss.
      files.ForEachPowerLoss(files.num_events(), 100, 1, [](const auto& disk) {
        EXPECT_EQ(disk.files.at("/t/a/data"), "some weights");
        EXPECT_EQ(disk.files.at("/t/a/manifest.json"), "{}");
      });
      return;
    }
    const DiskImage now = files.Latest();
    if (now.directories.count("/t/a") != 0) {
      // Only the last sync has failed.
      EXPECT_EQ(now.files.at("/t/a/data"), "some weights");
    }
    EXPECT_TRUE(RemoveUnfinishedFetches(files, "/t").ok());
    for (const auto& [path, content] : files.Latest().files) {
      EXPECT_EQ(path.find(".fetching"), std::string::npos) << path;
    }
    EXPECT_EQ(files.Latest().directories.count("/t/.a.fetching"), 0u);
    files.ForEachPowerLoss(files.num_events(), 100, 1, [](const auto& disk) {
      if (disk.directories.count("/t/a") == 0) return;
      EXPECT_EQ(disk.files.at("/t/a/data"), "some weights");
    });
  };
  int64_t faults = 0;
  for (const Disk fault :
       {Disk::kKill, Disk::kNoSpace, Disk::kIoError, Disk::kShortWrite}) {
    for (int64_t call = 1;; ++call) {
      CrashFileSystem files(Published());
      files.FailAt(call, fault);
      RemoteCheckpoints remote(store_, files, kServer, 2);
      const absl::Status fetched = remote.Fetch(kKey, "/t/a").status();
      faults += files.faults();
      if (files.calls() < call) {
        EXPECT_TRUE(fetched.ok());
        break;
      }
      check(files, fetched);
    }
  }
  EXPECT_GT(faults, 30);
  for (int64_t call = 1;; ++call) {
    CrashFileSystem files(Published());
    store_.FailAt(call, Store::kDead);
    RemoteCheckpoints remote(store_, files, kServer, 2);
    const absl::Status fetched = remote.Fetch(kKey, "/t/a").status();
    if (store_.calls() < call) break;
    EXPECT_EQ(Reason(fetched), "STORAGE_UNREACHABLE");
    check(files, fetched);
  }
}

TEST_F(RemoteTest, EveryFlippedByteAndTruncationIsSeen) {
  CrashFileSystem from(Published());
  ASSERT_TRUE(StoreIt(from, 1).ok());
  const auto whole = store_.objects;
  int64_t tried = 0;
  for (const auto& [key, content] : whole) {
    for (size_t i = 0; i < content.size(); ++i) {
      for (const bool cut : {false, true}) {
        store_.objects = whole;
        std::string& changed = store_.objects[key];
        if (cut) {
          changed.resize(i);
        } else {
          changed[i] = static_cast<char>(changed[i] ^ 1);
        }
        CrashFileSystem files(Published());
        RemoteCheckpoints remote(store_, files, kServer, 2);
        const auto fetched = remote.Fetch(kKey, "/t/a");
        ++tried;
        if (fetched.ok()) {
          // What the commit says beside names, sizes and digests of files.
          ASSERT_TRUE(key.ends_with("commit.json")) << key << " " << i;
          EXPECT_EQ(files.Latest().files.at("/t/a/data"), "some weights");
          continue;
        }
        const std::string reason = Reason(fetched.status());
        EXPECT_TRUE(reason == "OBJECT_CORRUPT" || reason == "STATE_VERSION")
            << key << " " << i << " " << fetched.status();
        EXPECT_EQ(files.Latest().directories.count("/t/a"), 0u);
      }
    }
  }
  EXPECT_GT(tried, 500);
}

TEST_F(RemoteTest, NamesThatLeadOutAreRefused) {
  CrashFileSystem from(Published());
  ASSERT_TRUE(StoreIt(from, 1).ok());
  const std::string key = std::string(kKey) + "/commit.json";
  const std::string whole = store_.objects[key];
  for (const char* name :
       {"../b", "/etc/x", ".hidden", "", "a/b", "..", "a\\u0000"}) {
    std::string changed = whole;
    changed.replace(changed.find("manifest.json"), 13, name);
    store_.objects[key] = changed;
    CrashFileSystem files(Published());
    RemoteCheckpoints remote(store_, files, kServer, 2);
    EXPECT_EQ(Reason(remote.Fetch(kKey, "/t/a").status()), "OBJECT_CORRUPT")
        << name;
  }
}

}  // namespace
}  // namespace gradwire
