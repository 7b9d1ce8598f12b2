// SPDX-License-Identifier: Apache-2.0
// A snapshot for inference, planned and written by a thread of its own while
// the training goes on. docs/snapshots.md.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "checkpoint/snapshot/writer.h"
#include "device/device.h"
#include "model/param_table.h"
#include "sharding/layout.h"
#include "trainer/piece_queue.h"
#include "trainer/trainer.h"
#include "trainer/unit_reader.h"

namespace gradwire {

// Where one rank has all of the weights they are read from where they lie, unit
// by unit, and an optimizer step waits for each unit before it changes it.
// Where they are gathered, which all ranks do together, they come by a queue
// that is bounded by the memory that there is.
//
// Thread rule: one thread at a time, beside its own.
class SnapshotSave {
 public:
  struct Part {
    const ParamTable& table;
    const ShardLayout& layout;
    Device& device;
    // The flat vector, which nothing on its way changes; null: gathered.
    Tensor weight;
    DType dtype = DType::kF32;  // of the weights, f32 or bf16
    // What CopyModelFiles takes.
    std::string model_directory;
    std::string config_json;
    int64_t queue_bytes = 0;  // most that wait in gathered()
  };
  // Begins at once. `written` is called by the thread, once, when the snapshot
  // is on the disk, hidden, or could not be brought there. What `part` names
  // outlives this.
  SnapshotSave(FileSystem& files, SnapshotRequest request, Part part,
               std::function<void(const absl::Status&)> written);
  // Gives up what is not yet written, and removes what is not published.
  // REQUIRES: where weights are gathered, gathered() has ended.
  ~SnapshotSave();
  SnapshotSave(const SnapshotSave&) = delete;

  // Where all of ReadParameters are pushed, and which is then ended.
  PieceQueue& gathered() { return gathered_; }
  // As UnitReader's.
  void AwaitRead(int unit) const { reader_.AwaitRead(unit); }

  // Once `written` was told OK. Errors: those of SnapshotWriter::Publish.
  absl::StatusOr<ExportOutcome> Publish();

 private:
  absl::Status Write();
  absl::Status WriteFromHere();
  absl::Status WriteGathered();

  FileSystem& files_;
  const Part part_;
  SnapshotRequest request_;
  UnitReader reader_;
  PieceQueue gathered_;
  // The thread's, until it has ended: what was made before, or what is made.
  ExportOutcome outcome_;
  std::unique_ptr<SnapshotWriter> writer_;
  std::thread thread_;  // last: it uses the others
};

}  // namespace gradwire
