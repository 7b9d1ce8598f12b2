// SPDX-License-Identifier: Apache-2.0
// Deletes checkpoints and snapshots that have expired, now and then.
// docs/snapshots.md.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/time/time.h"
#include "server/checkpoint_catalogue.h"

namespace gradwire {

class Collector {
 public:
  using OnDeleted =
      std::function<void(const CheckpointCatalogue::Deleted& deleted)>;
  // Begins at once, and again after each `interval`; the destructor ends it.
  // `before` is asked of each, and `on_deleted` told.
  Collector(CheckpointCatalogue catalogue, absl::Duration interval,
            CheckpointCatalogue::BeforeDelete before, OnDeleted on_deleted);
  ~Collector();

 private:
  void Run(absl::Duration interval);

  const CheckpointCatalogue catalogue_;
  const CheckpointCatalogue::BeforeDelete before_;
  const OnDeleted on_deleted_;
  std::mutex mutex_;
  std::condition_variable ending_;
  bool end_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace gradwire
