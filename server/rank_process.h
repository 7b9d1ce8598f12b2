// SPDX-License-Identifier: Apache-2.0
// A rank as a child process: start, end, and why it ended.
#pragma once

#include <sys/types.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace gradwire {

// Thread rule: all methods from any thread.
class RankProcess {
 public:
  // Starts `argv` in a process group of its own, with `environment` added to
  // this process's. `on_exit` is called once, from a thread of this object,
  // with the status that waitpid gives.
  // Errors: INTERNAL RANK_START_FAILED.
  static absl::StatusOr<std::unique_ptr<RankProcess>> Start(
      const std::vector<std::string>& argv,
      const std::map<std::string, std::string>& environment,
      std::function<void(int wait_status)> on_exit);
  // Kills what still runs and waits for it.
  ~RankProcess();

  pid_t pid() const { return pid_; }
  void Kill();

 private:
  RankProcess() = default;
  void Watch(const std::function<void(int wait_status)>& on_exit);

  pid_t pid_ = -1;
  absl::Mutex mu_;
  bool exited_ = false;  // guarded by mu_
  std::thread watcher_;
};

}  // namespace gradwire
