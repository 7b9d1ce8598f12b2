// SPDX-License-Identifier: Apache-2.0
// How far the collectives of one rank have come. Shared with the streams that
// wait for them, which may outlive the group.
#pragma once

#include <condition_variable>
#include <mutex>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "sharding/collectives.h"

namespace gradwire {

struct RankProgress {
  std::mutex mutex;
  std::condition_variable changed;
  // Collectives run in the order of their tickets: up to these they were asked
  // for, and are done.
  Collectives::Ticket last ABSL_GUARDED_BY(mutex) = 0;
  Collectives::Ticket completed ABSL_GUARDED_BY(mutex) = 0;
  // The first failure; and that nothing touches memory any more.
  absl::Status failure ABSL_GUARDED_BY(mutex);
  bool ended ABSL_GUARDED_BY(mutex) = false;

  // Waits until it is known how a collective ended.
  absl::Status ResultOf(Collectives::Ticket ticket) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.notify_all();  // whoever watches looks at once
    changed.wait(lock, [&] { return completed >= ticket || ended; });
    return completed >= ticket ? absl::OkStatus() : failure;
  }
};

}  // namespace gradwire
