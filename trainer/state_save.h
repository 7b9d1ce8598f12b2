// SPDX-License-Identifier: Apache-2.0
// One rank's part of a checkpoint, written by a thread of its own while the
// training goes on. docs/checkpoints.md.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"
#include "checkpoint/training_state.h"
#include "device/device.h"
#include "sharding/layout.h"
#include "trainer/optimizer.h"
#include "trainer/unit_reader.h"

namespace gradwire {

// Elements go to the disk from where they lie, unit by unit. Nothing is copied
// in the host's memory. What has been handed to the operating system may be
// changed; the sync comes at the end.
//
// Thread rule: one thread at a time, beside its own.
class StateSave {
 public:
  struct Part {
    const ShardLayout& layout;
    int rank = 0;
    Device& device;
    // Nothing that changes it is on its way.
    FlatState state;
    bool moments = false;  // else they are zero, and not written
  };
  // Begins to write into `directory` at once. `written` is called by the
  // thread, once, when all is on the disk or could not be brought there. What
  // `part` names outlives this.
  StateSave(FileSystem& files, std::string directory, Part part,
            std::function<void(const absl::Status&)> written);
  // Gives up what is not yet written.
  ~StateSave();
  StateSave(const StateSave&) = delete;

  // As UnitReader's.
  void AwaitRead(int unit) const { reader_.AwaitRead(unit); }

 private:
  absl::Status Write();
  absl::Status WriteUnit(int unit, StateWriter& writer);
  absl::Status WriteMaster(const ShardPiece& piece, StateWriter& writer);
  absl::Status WriteValues(const Tensor& values, const ShardPiece& piece,
                           StateWriter& writer);

  FileSystem& files_;
  const std::string directory_;
  const Part part_;
  UnitReader reader_;
  std::thread thread_;  // last: it uses the others
};

}  // namespace gradwire
