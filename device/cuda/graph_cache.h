// SPDX-License-Identifier: Apache-2.0
// Sections of a stream that have been queued before, as graphs of CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <list>
#include <string>
#include <string_view>
#include <unordered_map>

#include "absl/status/status.h"
#include "device/cuda/launch_record.h"

namespace gradwire {

// Queueing a transformer block call by call takes the host tens of
// microseconds, which a small model's block does not last; a graph takes one
// call. A record is queued call by call the first time, made a graph the second
// time, and is that graph from then on: for whoever sends batches of the same
// few shapes, whose buffers lie where they lay. Others pay for the comparison,
// which is less than the calls. Results have the same bits either way. Thread
// rule: one thread at a time.
class GraphCache {
 public:
  // There is room for so many. The least used makes room when it has not been
  // used for so many sections: of more that come in turns, each would go before
  // it is used again.
  static constexpr size_t kMostGraphs = 256;
  static constexpr int64_t kIdle = 1024;
  // Of what was seen once the oldest is forgotten.
  static constexpr size_t kMostSeen = 1024;

  GraphCache() = default;
  // Graphs that are still running go when they have ended.
  ~GraphCache();
  GraphCache(const GraphCache&) = delete;
  GraphCache& operator=(const GraphCache&) = delete;

  // Queues what was recorded. Errors: those of the calls.
  absl::Status Run(cudaStream_t stream, const LaunchRecord& record);

  struct Counts {
    int64_t issued = 0;    // call by call
    int64_t captured = 0;  // made a graph
    int64_t replayed = 0;  // a graph that was there
    int64_t refused = 0;   // not taken by CUDA as a graph
  };
  const Counts& counts() const { return counts_; }
  // Of all caches of the process.
  static int64_t NumReplayed() { return num_replayed_.load(); }

 private:
  struct Entry {
    std::string bytes;
    cudaGraphExec_t graph = nullptr;  // null: seen once, or refused
    bool refused = false;
    int64_t used = 0;  // the number of the section
  };
  // The most recently used first.
  using Entries = std::list<Entry>;

  // Makes a graph of it, or returns null: then CUDA does not take it.
  static cudaGraphExec_t Capture(cudaStream_t stream,
                                 const LaunchRecord& record);
  void Remember(const LaunchRecord& record);
  // Whether there is room for another graph now.
  bool MakeRoom();

  static inline std::atomic<int64_t> num_replayed_{0};

  Entries seen_, graphs_;
  std::unordered_map<std::string_view, Entries::iterator> found_;
  Counts counts_;
  int64_t sections_ = 0;
};

}  // namespace gradwire
