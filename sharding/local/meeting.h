// SPDX-License-Identifier: Apache-2.0
// Where threads meet that take part in the same collectives.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

namespace gradwire {

class Meeting {
 public:
  // What each rank brings, in rank order.
  using Offers = std::vector<const void*>;

  Meeting(int world, absl::Duration timeout);

  int world() const { return world_; }

  // Waits until all ranks have come, calls work(offers) in each, and returns
  // when it has returned in all. Only the coming can fail, and then `work` is
  // not called anywhere. Errors: those of Collectives.
  absl::Status Meet(int rank, const void* offer,
                    const std::function<void(const Offers&)>& work);

  // This and all later meetings fail, with `status` unless they did before.
  void End(const absl::Status& status);

  // `rank` will not come again.
  void Leave(int rank);

 private:
  // The first rank that has not come to a round, or world(); and the first of
  // them that never will.
  int Missing(int64_t round) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int Lost(int64_t round) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int world_;
  const absl::Duration timeout_;

  std::mutex mutex_;
  std::condition_variable changed_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  Offers offers_ ABSL_GUARDED_BY(mutex_);
  // Rounds that each rank has come to and has done; whether it left.
  std::vector<int64_t> came_ ABSL_GUARDED_BY(mutex_);
  std::vector<int64_t> done_ ABSL_GUARDED_BY(mutex_);
  std::vector<bool> left_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace gradwire
