// SPDX-License-Identifier: Apache-2.0
// A checkpoint of a training: weights and optimizer state, written by any
// number of ranks and read by any other. It is a directory that appears under
// its name complete and on the disk, or not at all. The format, and why each
// sync is needed, is docs/checkpoints.md.
//
// The model's parameters are one flat vector of `num_parameters` elements. Of
// it a checkpoint holds "weight" (f32) and, if there is optimizer state, "m"
// and "v" (f32 or bf16). Each rank writes disjoint pieces of them.
//
// To save: one rank makes a PendingState; every rank writes a file with a
// StateWriter; when all have finished, the first one publishes. To load: every
// rank opens a StateReader and reads the ranges that it needs.
//
// Errors of all functions, beside those named: the file system's.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "device/dtype.h"

namespace gradwire {

class StreamDigest;
struct StateIndex;
struct StateTable;

// What all ranks agree on.
struct StateHeader {
  int64_t num_parameters = 0;
  std::string model_digest;  // of what the elements mean; opaque
  int64_t optimizer_step = 0;
  int64_t weight_version = 0;
  std::map<std::string, std::string> attributes;  // for people: base_model, ...
};

struct StateSummary {
  int64_t bytes = 0;   // of all files
  std::string digest;  // of all their content, hexadecimal
};

// A piece of one vector, in the flat vector's numbering.
struct StatePiece {
  std::string vector;  // "weight", "m", "v"
  DType dtype = DType::kF32;
  int64_t begin = 0;  // elements
  int64_t count = 0;
};

struct StateWriterOptions {
  int64_t chunk_bytes = int64_t{64} << 20;  // each has a digest
};

// The file of one rank. The first error sticks: every later call returns it.
// Thread rule: one thread at a time.
class StateWriter {
 public:
  // `directory` exists (PendingState made it). 0 <= rank < 100000.
  static absl::StatusOr<std::unique_ptr<StateWriter>> Create(
      FileSystem& files, const std::string& directory, int rank,
      const StateWriterOptions& options = {});
  ~StateWriter();

  // Pieces may be appended in parts: Begin, then Write until all its bytes have
  // come. An empty piece is none.
  // Errors: INVALID_ARGUMENT STATE_PIECES_INVALID: unknown vector or a dtype
  // that it cannot have; negative; begun before the one before is complete;
  // more bytes than it has, or fewer at Finish; too many pieces.
  absl::Status Begin(const StatePiece& piece);
  absl::Status Write(const void* data, int64_t bytes);
  // Syncs the file, then writes and syncs the rank's table (pieces, digest of
  // each chunk).
  absl::Status Finish();

  int64_t bytes_written() const { return bytes_written_; }

 private:
  StateWriter(FileSystem& files, const std::string& directory,
              std::unique_ptr<File> data, std::unique_ptr<StateTable> table);
  absl::Status Stick(absl::Status status);
  absl::Status WriteSlice(const char* data, int64_t bytes);
  void EndChunk();

  FileSystem& files_;
  const std::string directory_;
  const std::unique_ptr<File> data_;
  const std::unique_ptr<StateTable> table_;
  const std::unique_ptr<StreamDigest> chunk_;  // of the bytes since its begin
  int64_t missing_bytes_ = 0;                  // of the piece that was begun
  int64_t bytes_written_ = 0;
  int64_t write_back_begin_ = 0;
  absl::Status status_;
};

// A checkpoint that does not exist yet: made by one rank before the others
// write, in a hidden sibling of `directory`. It outlives their writers.
class PendingState {
 public:
  // Removes what an earlier process has left of a checkpoint of this name.
  // `replaces`: if there is one, it stays until the new one is on the disk, and
  // then goes.
  // REQUIRES: one PendingState for a name at a time.
  // Errors: ALREADY_EXISTS CHECKPOINT_EXISTS, unless it replaces;
  // INVALID_ARGUMENT INVALID_NAME: the last segment of `directory` is empty or
  // begins with a dot.
  static absl::StatusOr<PendingState> Create(FileSystem& files,
                                             const std::string& directory,
                                             bool replaces = false);
  PendingState(PendingState&& other) noexcept;
  PendingState& operator=(PendingState&&) = delete;
  // Without Publish, removes what was written.
  ~PendingState();

  // Where ranks write; the same on all ranks: PendingPath(directory).
  const std::string& path() const { return pending_; }

  // When all `world` ranks have finished: reads their tables, checks that each
  // vector is covered exactly once, writes the manifest, syncs it and the
  // directory, renames it to its final name and syncs the parent. Once; but
  // after INVALID_ARGUMENT it may be called again.
  //
  // After OK, the checkpoint outlasts a power loss. After an error it is
  // complete or absent; complete only if the last sync failed, and then
  // RemoveLeftovers has to succeed before anybody relies on it. Where it
  // replaces another one, that one is there, complete, for as long as it is
  // absent; but on a file system that cannot exchange two names, there is a
  // moment without either, and after the end of a process in this moment,
  // RemoveLeftovers puts the earlier one back.
  //
  // Errors: INVALID_ARGUMENT STATE_HEADER_INVALID; INVALID_ARGUMENT
  // STATE_PIECES_INVALID: elements that no rank or more than one has written,
  // or that the model has not; ranks that have not finished or do not exist;
  // "m" without "v"; ALREADY_EXISTS CHECKPOINT_EXISTS; DATA_LOSS
  // CHECKPOINT_CORRUPT: a table is not what its rank wrote.
  absl::StatusOr<StateSummary> Publish(const StateHeader& header, int world);

 private:
  PendingState(FileSystem& files, std::string directory, bool replaces);
  absl::Status TakeName();
  absl::Status Replace();
  FileSystem* files_;
  std::string directory_;
  bool replaces_;
  std::string pending_;  // "" if there is nothing to remove
};

// "/a/.b.pending" of "/a/b".
std::string PendingPath(const std::string& directory);

// Takes a checkpoint away, be it damaged or not: its name is free when this
// returns. Who has opened it may go on reading.
// Errors: NOT_FOUND CHECKPOINT_NOT_FOUND.
absl::Status RemoveState(FileSystem& files, const std::string& directory);
// The same only if `holds` of it: what has taken its place since somebody
// looked, stays. It is asked of the directory that it lies in by then. False:
// it does not hold.
// REQUIRES: none of this and of a PendingState that replaces goes on beside it
// on a file system that cannot exchange two names; one of them fails there.
absl::StatusOr<bool> RemoveStateIf(
    FileSystem& files, const std::string& directory,
    const std::function<bool(const std::string& directory)>& holds);

// For the start of a process, while nobody saves in `parent`: syncs the
// directory, so that the checkpoints which are there remain, and removes what
// earlier processes have left of those that they did not publish, or had
// replaced.
absl::Status RemoveLeftovers(FileSystem& files, const std::string& parent);

// Gives a checkpoint a second place, `to`, without a copy of its bytes: what is
// there stays when the first is deleted or replaced. It appears complete or not
// at all, and outlasts a power loss when this returns. If there is one already,
// that is as good. False: the file system cannot.
// REQUIRES: one of these calls for a `to` at a time.
// Errors: NOT_FOUND CHECKPOINT_NOT_FOUND.
absl::StatusOr<bool> LinkState(FileSystem& files, const std::string& directory,
                               const std::string& to);

// What a checkpoint's manifest says, without a look at the rest. `digest`: that
// of StateSummary, if it is wanted.
// Errors: those of StateReader::Open that the manifest alone can have.
absl::StatusOr<StateHeader> ReadStateHeader(FileSystem& files,
                                            const std::string& directory,
                                            std::string* digest = nullptr);

// Thread rule: one thread at a time.
class StateReader {
 public:
  // Reads manifest and tables, not the elements. What declares a size is
  // compared with the files' sizes before anything of that size is allocated.
  // All that a reader reads is of one checkpoint, also if it is replaced
  // meanwhile.
  // Errors, with `checkpoint`, its name:
  //   NOT_FOUND CHECKPOINT_NOT_FOUND;
  //   INVALID_ARGUMENT CHECKPOINT_KIND_MISMATCH: the directory holds something
  //     else, a Hugging Face model for example;
  //   DATA_LOSS CHECKPOINT_CORRUPT (file, and field or chunk);
  //   FAILED_PRECONDITION STATE_VERSION (have, need).
  static absl::StatusOr<std::unique_ptr<StateReader>> Open(
      FileSystem& files, const std::string& directory);
  ~StateReader();

  const StateHeader& header() const { return header_; }
  const StateSummary& summary() const { return summary_; }
  // How many ranks wrote it.
  int world() const;
  // Null if the checkpoint has no such vector.
  std::optional<DType> dtype(const std::string& vector) const;

  // That the chunks which hold these elements have their digests. Each chunk is
  // verified once per reader.
  // Errors: DATA_LOSS CHECKPOINT_CORRUPT; INVALID_ARGUMENT
  // STATE_PIECES_INVALID: there is no such vector or range; ABORTED
  // CHECKPOINT_REPLACED: it was, before this file was first read; open it
  // again.
  absl::Status Verify(const std::string& vector, int64_t begin, int64_t count);
  // `out` gets count elements in the vector's dtype. Verifies what was not
  // verified yet, in the same pass. Errors: as Verify; `out` is then undefined.
  absl::Status Read(const std::string& vector, int64_t begin, int64_t count,
                    void* out);

 private:
  struct RankFile;
  struct ByteRange {
    int64_t begin = 0;
    int64_t end = 0;
  };
  StateReader(FileSystem& files, std::string directory);
  absl::Status WithName(const absl::Status& status) const;
  absl::Status Load();
  // Whether the manifest is still the one that was read.
  absl::StatusOr<bool> IsThere() const;
  absl::Status OpenData(RankFile& file, int rank);
  absl::StatusOr<StateTable> LoadTable(int rank, int64_t bytes,
                                       const std::string& digest);
  // `out` may be null: to verify only.
  absl::Status Visit(const std::string& vector, int64_t begin, int64_t count,
                     char* out);
  absl::Status VisitBytes(int rank, int64_t begin, int64_t end, char* out);
  absl::Status VerifyChunk(RankFile& file, int64_t chunk, ByteRange all,
                           ByteRange wanted, char* out);
  static absl::Status ReadExactly(RankFile& file, int64_t offset, int64_t bytes,
                                  char* out);

  FileSystem& files_;
  const std::string directory_;
  std::string manifest_digest_;  // of all of its text
  StateHeader header_;
  StateSummary summary_;
  std::vector<RankFile> ranks_;
  std::unique_ptr<StateIndex> index_;
  std::vector<char> window_;
};

}  // namespace gradwire
