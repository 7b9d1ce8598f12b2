// SPDX-License-Identifier: Apache-2.0
// What stands behind cudaStream_t and cudaEvent_t on the emulator: a stream is
// a thread that does one thing after another, so that work which waits for
// nothing in the source waits for nothing here either, and the thread sanitizer
// sees it.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

// The types that CUDA's headers leave open; they must be global.
struct CUstream_st {
 public:
  CUstream_st();
  // Does all that was queued.
  ~CUstream_st();

  // While it is captured, it goes to what will be a graph.
  void Add(std::function<void()> work);
  void Synchronize();

  void BeginCapture();
  bool IsCaptured();
  // What cannot be part of a graph has been asked for.
  void SpoilCapture();
  // Whether there was a capture that was not spoilt, whose work is then *out.
  bool EndCapture(std::vector<std::function<void()>>* out);

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool running_ = false;
  bool stop_ = false;
  bool captured_ = false, spoilt_ = false;
  std::vector<std::function<void()>> graph_;
  std::thread thread_;
};

namespace gradwire::cuda_emulator {

// Null stands for the default stream. Ends the process if the thread records
// what it queues there (device/cuda/launch_record.h): whoever asks would come
// before what was recorded.
CUstream_st& StreamOf(cudaStream_t stream);

}  // namespace gradwire::cuda_emulator
