// SPDX-License-Identifier: Apache-2.0
#include "sharding/queued_collectives.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "base/check.h"
#include "sharding/collective_error.h"

namespace gradwire {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class QueuedCollectives : public Collectives {
 public:
  explicit QueuedCollectives(std::unique_ptr<BlockingCollectives> backend)
      : backend_(std::move(backend)), thread_([this] { Run(); }) {}

  ~QueuedCollectives() override {
    bool busy;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      busy = running_ || !queue_.empty();
    }
    if (busy) Abort(CollectiveFailed(rank(), "it left the group"));
    wake_.notify_one();
    thread_.join();
  }

  int rank() const override { return backend_->rank(); }
  int world() const override { return backend_->world(); }

  Ticket AllGather(Stream&, const Tensor& shard, const Tensor& full) override {
    GW_CHECK(shard.dtype() == full.dtype());
    GW_CHECK(full.num_elements() == world() * shard.num_elements());
    return Add([=, this] { return backend_->AllGather(shard, full); });
  }

  Ticket ReduceScatterParts(Stream&, const Tensor& full, int64_t stride,
                            const Tensor& shard, bool accumulate) override {
    const int64_t n = shard.num_elements();
    GW_CHECK(full.dtype() == DType::kF32 && shard.dtype() == DType::kF32);
    GW_CHECK(stride >= n && full.num_elements() == (world() - 1) * stride + n);
    return Add([=, this] {
      return backend_->ReduceScatterParts(full, stride, shard, accumulate);
    });
  }

  Ticket AllReduce(Stream&, const Tensor& values) override {
    GW_CHECK(values.dtype() == DType::kF32 || values.dtype() == DType::kF64);
    return Add([=, this] { return backend_->AllReduce(values); });
  }

  Ticket Broadcast(Stream&, const Tensor& values, int root) override {
    GW_CHECK(0 <= root && root < world());
    return Add([=, this] { return backend_->Broadcast(values, root); });
  }

  absl::Status Wait(Stream&, Ticket ticket) override {
    std::unique_lock<std::mutex> lock(mutex_);
    GW_CHECK(0 < ticket && ticket <= last_ticket_);
    const auto done = [&] { return completed_ >= ticket || ended_; };
    if (!done()) {
      const Clock::time_point start = Clock::now();
      done_.wait(lock, done);
      statistics_.wait_seconds += SecondsSince(start);
    }
    return completed_ >= ticket ? absl::OkStatus() : failure_;
  }

  void Abort(const absl::Status& status) override {
    GW_CHECK(!status.ok());
    // Together: the thread must find neither without the other.
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.ok()) failure_ = status;
    backend_->Interrupt();
    wake_.notify_one();
  }

  Statistics statistics() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    Statistics statistics = statistics_;
    statistics.bytes_sent = backend_->bytes_sent();
    return statistics;
  }

 private:
  Ticket Add(std::function<absl::Status()> collective) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!ended_) queue_.push_back(std::move(collective));
    wake_.notify_one();
    return ++last_ticket_;
  }

  // The thread. Tickets are told of a failure after the backend's End, when
  // nothing touches their memory any more.
  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] {
        return stop_ || !queue_.empty() || (!failure_.ok() && !ended_);
      });
      if (!failure_.ok() && !ended_) {
        lock.unlock();
        backend_->End();
        lock.lock();
        queue_.clear();
        ended_ = true;
        done_.notify_all();
      } else if (!queue_.empty()) {
        RunFirst(lock);
      } else if (stop_) {
        return;
      }
    }
  }

  void RunFirst(std::unique_lock<std::mutex>& lock) {
    const std::function<absl::Status()> collective = std::move(queue_.front());
    queue_.pop_front();
    running_ = true;
    lock.unlock();
    const Clock::time_point start = Clock::now();
    const absl::Status status = collective();
    const double seconds = SecondsSince(start);
    lock.lock();
    running_ = false;
    statistics_.busy_seconds += seconds;
    if (status.ok()) {
      ++statistics_.collectives;
      ++completed_;
      done_.notify_all();
    } else if (failure_.ok()) {
      failure_ = status;
    }
  }

  const std::unique_ptr<BlockingCollectives> backend_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;  // the thread
  std::condition_variable done_;  // Wait
  std::deque<std::function<absl::Status()>> queue_ ABSL_GUARDED_BY(mutex_);
  bool running_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  // The first failure; and that the backend's End has returned.
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  Ticket last_ticket_ ABSL_GUARDED_BY(mutex_) = 0;
  // Collectives run in the order of their tickets, so these are the tickets up
  // to this one.
  Ticket completed_ ABSL_GUARDED_BY(mutex_) = 0;
  Statistics statistics_ ABSL_GUARDED_BY(mutex_);

  std::thread thread_;
};

}  // namespace

std::unique_ptr<Collectives> NewQueuedCollectives(
    std::unique_ptr<BlockingCollectives> backend) {
  return std::make_unique<QueuedCollectives>(std::move(backend));
}

}  // namespace gradwire
