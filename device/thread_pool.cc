// SPDX-License-Identifier: Apache-2.0
#include "device/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"

namespace gradwire {
namespace {

// About 20-50 microseconds on current cores: longer than the gap between two
// ops of a step if the threads' shares are even.
constexpr int kSpins = 2000;
// Waking a sleeper takes tens of microseconds, in a virtual machine more than a
// small op. So a worker without work goes on looking, but lets others have the
// core, for longer than one share of a large op outlasts another and less than
// anything a person or a battery would notice.
constexpr std::chrono::milliseconds kLinger{3};

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

struct ThreadPool::Impl {
  std::mutex mutex;
  std::condition_variable wake;
  // Written under `mutex`, read by spinning workers without it.
  std::atomic<uint64_t> generation{0};
  std::atomic<int> running{0};
  std::atomic<bool> stop{false};
  const std::function<void(int)>* body = nullptr;
  std::vector<std::thread> threads;
};

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), impl_(std::make_unique<Impl>()) {
  GW_CHECK(num_threads >= 1);
  for (int t = 1; t < num_threads; ++t) {
    impl_->threads.emplace_back([this, t] {
      Impl& impl = *impl_;
      uint64_t seen = 0;
      while (true) {
        const auto idle = [&] {
          return impl.generation.load(std::memory_order_acquire) == seen;
        };
        for (int spin = 0; spin < kSpins && idle(); ++spin) Pause();
        if (idle()) {
          const auto end = std::chrono::steady_clock::now() + kLinger;
          while (idle() && std::chrono::steady_clock::now() < end) {
            std::this_thread::yield();
          }
        }
        if (idle()) {
          std::unique_lock<std::mutex> lock(impl.mutex);
          impl.wake.wait(lock, [&] { return impl.generation.load() != seen; });
        }
        seen = impl.generation.load(std::memory_order_acquire);
        if (impl.stop.load()) return;
        (*impl.body)(t);
        impl.running.fetch_sub(1, std::memory_order_acq_rel);
      }
    });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->stop = true;
    impl_->generation.fetch_add(1);
  }
  impl_->wake.notify_all();
  for (std::thread& thread : impl_->threads) thread.join();
}

void ThreadPool::Run(const std::function<void(int)>& body) {
  if (num_threads_ == 1) {
    body(0);
    return;
  }
  Impl& impl = *impl_;
  {
    std::lock_guard<std::mutex> lock(impl.mutex);
    impl.body = &body;
    impl.running.store(num_threads_ - 1, std::memory_order_relaxed);
    impl.generation.fetch_add(1, std::memory_order_acq_rel);
  }
  impl.wake.notify_all();
  body(0);
  int spin = 0;
  while (impl.running.load(std::memory_order_acquire) != 0) {
    // The caller has nothing else to do; give the core away when the machine is
    // oversubscribed and a worker needs it.
    if (++spin < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::ParallelFor(
    int64_t n, int64_t grain,
    const std::function<void(int64_t, int64_t)>& body) {
  GW_CHECK(grain >= 1);
  if (n <= 0) return;
  const int64_t grains = (n + grain - 1) / grain;
  if (grains == 1 || num_threads_ == 1) {
    body(0, n);
    return;
  }
  Run([&](int thread) {
    const int64_t begin = grains * thread / num_threads_ * grain;
    const int64_t end =
        std::min(n, grains * (thread + 1) / num_threads_ * grain);
    if (begin < end) body(begin, end);
  });
}

void ThreadPool::ParallelItems(int64_t n,
                               const std::function<void(int64_t, int)>& body) {
  std::atomic<int64_t> next{0};
  if (n == 1) {
    body(0, 0);
    return;
  }
  Run([&](int thread) {
    for (int64_t item = next.fetch_add(1, std::memory_order_relaxed); item < n;
         item = next.fetch_add(1, std::memory_order_relaxed)) {
      body(item, thread);
    }
  });
}

}  // namespace gradwire
