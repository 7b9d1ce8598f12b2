// SPDX-License-Identifier: Apache-2.0
// What tests of saves beside a training have in common.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

#include "tests/equivalence/sharded_job.h"
#include "trainer/trainer.h"

namespace gradwire {

// Writes wait until they are allowed.
class Gate {
 public:
  int Pass() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return allowed_ > 0 || error_ != 0; });
    --waiting_;
    if (error_ != 0) return error_;
    --allowed_;
    return 0;
  }
  void Allow(int64_t writes) {
    const std::lock_guard lock(mutex_);
    allowed_ += writes;
    changed_.notify_all();
  }
  void Close() {
    const std::lock_guard lock(mutex_);
    allowed_ = 0;
  }
  void Fail(int error) {
    const std::lock_guard lock(mutex_);
    error_ = error;
    changed_.notify_all();
  }
  // Once so many threads are at the gate; false if that takes too long.
  bool Await(int waiting) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(60),
                             [&] { return waiting_ >= waiting; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t allowed_ = 0;
  int waiting_ = 0;
  int error_ = 0;
};

inline constexpr int64_t kAny = int64_t{1} << 40;

inline std::string Fresh(const std::string& name) {
  static int number = 0;
  const std::string path =
      testing::TempDir() + "/save_" + name + "_" + std::to_string(++number);
  std::filesystem::remove_all(path);
  return path;
}

inline std::map<std::string, std::string> Files(const std::string& directory) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    std::ifstream file(entry.path(), std::ios::binary);
    files[entry.path().filename()] =
        std::string(std::istreambuf_iterator<char>(file), {});
  }
  return files;
}

inline OptimParams Params() {
  OptimParams params;
  params.learning_rate = 1e-2;
  params.weight_decay = 0.1;
  return params;
}

inline void Backward(Job& job, uint32_t seed) {
  job.Forward(Batch(job.config().vocab, seed, kLengths), WithBackward());
}

inline void Train(Job& job, uint32_t begin, uint32_t end) {
  for (uint32_t step = begin; step < end; ++step) {
    Backward(job, step);
    job.Step(Params());
  }
}

struct Shape {
  int world;
  int replicas;
  Precision precision, moments;
  int writers() const { return world / replicas; }
};

template <class Future>
bool IsReady(const Future& future, std::chrono::milliseconds timeout) {
  return future.wait_for(timeout) == std::future_status::ready;
}

}  // namespace gradwire
