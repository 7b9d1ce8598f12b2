// SPDX-License-Identifier: Apache-2.0
// A communicator of NCCL that never blocks for good.
#pragma once

#include <nccl.h>

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace gradwire {

// NCCL works in its non-blocking mode: whoever waits for it looks up now and
// then, and gives up when told to.
// Thread rule: one thread at a time.
class NcclComm {
 public:
  struct Options {
    int rank = 0;
    int world = 1;
    int name = 0;  // of the rank, in errors
    // How long NCCL may take for what a call begins (connections, mostly).
    absl::Duration timeout;
    // True: somebody wants to abort.
    std::function<bool()> given_up;
  };

  // Returns when all ranks have come.
  // Errors: UNAVAILABLE COLLECTIVE_FAILED with what NCCL says and this rank,
  // or that it took too long, or that it was given up.
  static absl::StatusOr<std::unique_ptr<NcclComm>> Create(
      const ncclUniqueId& id, const Options& options);
  // Lets the peers finish what they have in common, unless it was aborted.
  ~NcclComm();
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  // Queues what `calls` calls as one group; it returns its first result that is
  // neither ncclSuccess nor ncclInProgress. Errors: as Create.
  absl::Status Run(const std::function<ncclResult_t(ncclComm_t)>& calls);

  // What has gone wrong meanwhile. Errors: COLLECTIVE_FAILED.
  absl::Status AsyncError();

  // Ends all that was queued, on the device, too. Nothing may follow.
  void Abort();

 private:
  explicit NcclComm(const Options& options) : options_(options) {}
  // Waits while NCCL is under way.
  absl::Status Settle();
  absl::Status ToStatus(ncclResult_t result) const;

  const Options options_;
  ncclComm_t comm_ = nullptr;
};

}  // namespace gradwire
