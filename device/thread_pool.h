// SPDX-License-Identifier: Apache-2.0
// The CPU backend's threads: one pool. Work whose sums depend on how it is cut
// is cut by its shape and the number of threads alone.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace gradwire {

// Workers spin for a short while after a task and then sleep, so that a step
// made of many small ops does not pay a wake-up for each.
// Thread rule: ParallelFor is called by one thread at a time and not from
// within a task.
class ThreadPool {
 public:
  // `num_threads` counts the caller, which works too. REQUIRES: >= 1.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls body(thread) for thread = 0 .. num_threads()-1, each on its own
  // thread (0 is the caller), and returns when all have returned.
  void Run(const std::function<void(int thread)>& body);

  // Cuts [0, n) into at most num_threads() ranges that start at multiples of
  // `grain` and calls body(begin, end) for each non-empty one.
  void ParallelFor(int64_t n, int64_t grain,
                   const std::function<void(int64_t begin, int64_t end)>& body);

  // Calls body(item, thread) for item = 0 .. n-1; threads take the next item
  // when they are free. For items of unequal cost whose results do not depend
  // on which thread ran them.
  void ParallelItems(int64_t n,
                     const std::function<void(int64_t item, int thread)>& body);

 private:
  struct Impl;
  const int num_threads_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace gradwire
