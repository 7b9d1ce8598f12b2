// SPDX-License-Identifier: Apache-2.0
#include "device/cuda/graph_cache.h"

#include "base/log.h"
#include "device/cuda/cuda_status.h"

namespace gradwire {

GraphCache::~GraphCache() {
  for (const Entry& entry : graphs_) cudaGraphExecDestroy(entry.graph);
}

cudaGraphExec_t GraphCache::Capture(cudaStream_t stream,
                                    const LaunchRecord& record) {
  cudaGraphExec_t made = nullptr;
  if (cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) ==
      cudaSuccess) {
    const bool taken = record.IssueTo(stream).ok();
    cudaGraph_t graph = nullptr;
    const bool ended = cudaStreamEndCapture(stream, &graph) == cudaSuccess;
    if (taken && ended && graph != nullptr &&
        cudaGraphInstantiate(&made, graph, 0) != cudaSuccess) {
      made = nullptr;
    }
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
  // It was for us, and not for the next call.
  if (made == nullptr) (void)cudaGetLastError();
  return made;
}

void GraphCache::Remember(const LaunchRecord& record) {
  seen_.push_front({.bytes = record.bytes()});
  found_.emplace(seen_.front().bytes, seen_.begin());
  if (seen_.size() > kMostSeen) {
    found_.erase(seen_.back().bytes);
    seen_.pop_back();
  }
}

bool GraphCache::MakeRoom() {
  if (graphs_.size() < kMostGraphs) return true;
  const Entry& least = graphs_.back();
  if (sections_ - least.used < kIdle) return false;
  found_.erase(least.bytes);
  cudaGraphExecDestroy(least.graph);
  graphs_.pop_back();
  return true;
}

absl::Status GraphCache::Run(cudaStream_t stream, const LaunchRecord& record) {
  ++sections_;
  const auto issue = [&] {
    ++counts_.issued;
    return record.IssueTo(stream);
  };
  if (!record.repeats()) return issue();
  const auto found = found_.find(record.bytes());
  if (found == found_.end()) {
    Remember(record);
    return issue();
  }
  const Entries::iterator entry = found->second;
  if (entry->refused) return issue();
  if (entry->graph != nullptr) {
    ++counts_.replayed;
    ++num_replayed_;
    graphs_.splice(graphs_.begin(), graphs_, entry);
  } else {
    if (!MakeRoom()) return issue();
    entry->graph = Capture(stream, record);
    if (entry->graph == nullptr) {
      entry->refused = true;
      if (++counts_.refused == 1) {
        spdlog::warn(
            "CUDA does not take a block as a graph; it is queued call by call");
      }
      return issue();
    }
    ++counts_.captured;
    graphs_.splice(graphs_.begin(), seen_, entry);
  }
  entry->used = sections_;
  return CudaStatus(cudaGraphLaunch(entry->graph, stream), "a graph");
}

}  // namespace gradwire
