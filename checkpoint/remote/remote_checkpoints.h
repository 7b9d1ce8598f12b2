// SPDX-License-Identifier: Apache-2.0
// Published directories (checkpoints of trainings, snapshots) in an object
// store: each is there whole or not at all. docs/object_storage.md.
//
// Of a directory "a/b", files go to a/b/<server>-<epoch>-<hash>/<file>; then
// one conditional request makes a/b/commit.json, and with it all of them
// visible. The same request puts it in the place of an earlier one.
//
// Errors of all functions, beside those named: those of ObjectStore and of the
// file system.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "checkpoint/remote/object_store.h"

namespace gradwire {

struct RemoteFile {
  std::string name;
  int64_t bytes = 0;
  std::string sha256;  // hexadecimal
};

struct RemoteCommit {
  int64_t epoch = 0;  // of the server that stored it
  std::string folder;
  // Of the directory itself, as its kind has it; opaque.
  std::string digest;
  // Another directory beside it, without which it is of no use; may be empty.
  std::string parent;
  int64_t created_micros = 0;
  std::vector<RemoteFile> files;

  int64_t bytes() const;
};

// Thread rule: any method from any thread, but of one `key` one at a time.
class RemoteCheckpoints {
 public:
  // Of a server, by a name of [a-z0-9] that is its own, in one of its lives;
  // each has a higher epoch. Both outlive it.
  RemoteCheckpoints(ObjectStore& store, FileSystem& files, std::string server,
                    int64_t epoch)
      : store_(store),
        files_(files),
        server_(std::move(server)),
        epoch_(epoch) {}

  // NOT_FOUND REMOTE_CHECKPOINT_NOT_FOUND.
  static absl::Status Missing(const std::string& key);

  // Nullopt: there is none. Errors: DATA_LOSS OBJECT_CORRUPT;
  // FAILED_PRECONDITION STATE_VERSION: written by a newer version.
  absl::StatusOr<std::optional<RemoteCommit>> Find(const std::string& key);
  // Of `key`, whole segments: what is committed directly below it.
  absl::StatusOr<std::vector<std::string>> ListNames(const std::string& key);

  // What is stored, and from where.
  struct Source {
    std::string directory;
    std::string digest;
    std::string parent;
    int64_t created_micros = 0;
    // One that this server stored, in this life or an earlier one, is replaced,
    // and is there until this one is.
    bool replaces = false;
    // Called before what was stored is committed: that it was all of what it
    // was to be of. Files do not change, but their directory may.
    std::function<absl::Status()> check = [] { return absl::OkStatus(); };
  };
  // If there is one of the same digest, that is as good.
  // Errors: ALREADY_EXISTS REMOTE_CHECKPOINT_EXISTS: there is another one.
  absl::StatusOr<RemoteCommit> Store(const std::string& key,
                                     const Source& source);

  // Makes `directory` again: its parent exists, it does not. Each file has its
  // SHA-256, or nothing is there.
  // Errors: NOT_FOUND REMOTE_CHECKPOINT_NOT_FOUND; DATA_LOSS OBJECT_CORRUPT;
  // RESOURCE_EXHAUSTED STORAGE_FULL, before anything is fetched, if there is
  // no space.
  absl::StatusOr<RemoteCommit> Fetch(const std::string& key,
                                     const std::string& directory);

  // Stored by this server, in this life or an earlier one.
  bool IsOwn(const RemoteCommit& commit) const;

  // Nothing there is as good.
  absl::Status Remove(const std::string& key);

  // Removes what this server has begun to store below `key` in earlier lives
  // and not committed.
  absl::Status Sweep(const std::string& key);

 private:
  // The same for every try of one life, which writes the same bytes.
  std::string FolderOf(const std::string& digest) const;
  // Of an earlier life.
  bool IsLeft(const std::string& folder) const;
  // `version` as ObjectStore::Get's.
  absl::StatusOr<std::optional<RemoteCommit>> Find(const std::string& key,
                                                   std::string* version);
  // What stays, Sweep removes.
  void DeleteFiles(const std::string& key, const RemoteCommit& commit);
  absl::Status FetchAs(const std::string& key, const RemoteCommit& commit,
                       const std::string& directory);
  absl::Status FetchFiles(const std::string& key, const RemoteCommit& commit,
                          const std::string& into);

  ObjectStore& store_;
  FileSystem& files_;
  const std::string server_;
  const int64_t epoch_;
};

// Where a Fetch of `directory` writes: "/a/.b.fetching" of "/a/b". What a
// process has left there, the next Fetch or this removes.
std::string FetchingPath(const std::string& directory);
absl::Status RemoveUnfinishedFetches(FileSystem& files,
                                     const std::string& parent);

}  // namespace gradwire
