// SPDX-License-Identifier: Apache-2.0
#include "server/collector.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/log.h"
#include "spdlog/spdlog.h"

namespace gradwire {

Collector::Collector(CheckpointCatalogue catalogue, absl::Duration interval,
                     CheckpointCatalogue::BeforeDelete before,
                     OnDeleted on_deleted)
    : catalogue_(std::move(catalogue)),
      before_(std::move(before)),
      on_deleted_(std::move(on_deleted)),
      thread_([this, interval] { Run(interval); }) {}

Collector::~Collector() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_ = true;
  }
  ending_.notify_all();
  thread_.join();
}

void Collector::Run(absl::Duration interval) {
  std::string failure;
  for (;;) {
    std::vector<CheckpointCatalogue::Deleted> deleted;
    const absl::Status status =
        catalogue_.DeleteExpired(absl::Now(), before_, deleted);
    for (const CheckpointCatalogue::Deleted& each : deleted) {
      spdlog::info("gradwire://{} has expired and was deleted",
                   each.ref.path());
      on_deleted_(each);
    }
    // Once for each reason.
    const std::string now(status.message());
    if (!now.empty() && now != failure) {
      spdlog::warn("what has expired cannot be deleted: {}", now);
    }
    failure = now;
    std::unique_lock<std::mutex> lock(mutex_);
    if (ending_.wait_for(lock, absl::ToChronoNanoseconds(interval),
                         [this] { return end_; })) {
      return;
    }
  }
}

}  // namespace gradwire
