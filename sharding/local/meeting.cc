// SPDX-License-Identifier: Apache-2.0
#include "sharding/local/meeting.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <mutex>

#include "sharding/collective_error.h"

namespace gradwire {
namespace {

// What a clock can still add to now.
constexpr absl::Duration kForever = absl::Hours(24 * 365);

}  // namespace

Meeting::Meeting(int world, absl::Duration timeout)
    : world_(world),
      timeout_(std::min(timeout, kForever)),
      offers_(static_cast<size_t>(world)),
      came_(static_cast<size_t>(world)),
      done_(static_cast<size_t>(world)),
      left_(static_cast<size_t>(world)) {}

int Meeting::Missing(int64_t round) const {
  int rank = 0;
  while (rank < world_ && came_[static_cast<size_t>(rank)] > round) ++rank;
  return rank;
}

int Meeting::Lost(int64_t round) const {
  int rank = 0;
  while (rank < world_ && (came_[static_cast<size_t>(rank)] > round ||
                           !left_[static_cast<size_t>(rank)])) {
    ++rank;
  }
  return rank;
}

absl::Status Meeting::Meet(int rank, const void* offer,
                           const std::function<void(const Offers&)>& work) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!failure_.ok()) return failure_;
  const size_t me = static_cast<size_t>(rank);
  const int64_t round = came_[me]++;
  offers_[me] = offer;
  changed_.notify_all();
  changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout_), [&] {
    return Missing(round) == world_ || Lost(round) < world_ || !failure_.ok();
  });
  // A failure is one only while somebody is missing: then it is one for all.
  if (Missing(round) < world_) {
    if (failure_.ok()) {
      failure_ = Lost(round) < world_
                     ? CollectiveFailed(Lost(round), "it left the group")
                     : CollectiveTimeout(Missing(round), timeout_);
      changed_.notify_all();
    }
    return failure_;
  }
  lock.unlock();
  // Nobody changes the offers before all are done.
  work(offers_);
  lock.lock();
  ++done_[me];
  changed_.notify_all();
  changed_.wait(lock, [&] {
    return std::all_of(done_.begin(), done_.end(),
                       [&](int64_t done) { return done > round; });
  });
  return absl::OkStatus();
}

void Meeting::End(const absl::Status& status) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.ok()) failure_ = status;
  changed_.notify_all();
}

void Meeting::Leave(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  left_[static_cast<size_t>(rank)] = true;
  changed_.notify_all();
}

}  // namespace gradwire
