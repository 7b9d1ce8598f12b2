// SPDX-License-Identifier: Apache-2.0
// The server's directory: one server at a time, everything it keeps.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "checkpoint/file_system.h"

namespace gradwire {

class StateDir {
 public:
  // Makes the directory (0700) and locks it for the life of this object.
  // Errors: FAILED_PRECONDITION STATE_DIR_LOCKED, STATE_DIR_UNUSABLE.
  static absl::StatusOr<std::unique_ptr<StateDir>> Open(
      const std::string& path);
  ~StateDir();

  const std::string& path() const { return path_; }
  std::string jobs() const { return path_ + "/jobs"; }
  std::string metadata() const { return path_ + "/gradwire.db"; }
  // Of checkpoint/fence.h.
  std::string epochs() const { return path_ + "/epoch"; }

  // Removes what a server that ended in the middle of a save has left. For one
  // that has the lease: what another one writes is none of that.
  // Errors: those of RemoveLeftovers and RecoverSnapshots.
  absl::Status RemoveLeftovers(FileSystem& files) const;

  // Of SpaceReserve.
  std::string reserve() const { return path_ + "/reserve"; }
  // Chooses a path for the ranks' socket, short enough for one, that no server
  // with another epoch has, and takes away the sockets of those.
  // Errors: FAILED_PRECONDITION STATE_DIR_UNUSABLE.
  absl::Status PlaceSocket(int64_t epoch);
  const std::string& socket() const { return socket_; }

 private:
  StateDir() = default;
  std::string path_;
  std::string socket_;
  std::string socket_dir_;  // removed at the end; empty: none of its own
  int lock_fd_ = -1;
};

// Writes {"grpc": ..., "metrics": ..., "pid": ...} atomically, with "rank"
// where ranks have an address; the destructor removes the file if it is still
// this process's.
class PortFile {
 public:
  // Errors: FAILED_PRECONDITION PORT_FILE_UNUSABLE.
  static absl::StatusOr<std::unique_ptr<PortFile>> Write(
      const std::string& path, const std::string& grpc_address,
      const std::string& metrics_address, const std::string& rank_address);
  ~PortFile();

 private:
  PortFile() = default;
  std::string path_;
  std::string content_;
};

}  // namespace gradwire
