// SPDX-License-Identifier: Apache-2.0
// The calls of CUDA's runtime that gradwire makes, on a host without a GPU: one
// device whose memory is the host's.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "device/cuda/launch_record.h"
#include "tests/cuda_emulator/block.h"
#include "tests/cuda_emulator/emulated_gpu.h"
#include "tests/cuda_emulator/streams.h"

namespace {

using Clock = std::chrono::steady_clock;

// One use of an event.
struct Recording {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  Clock::time_point at;

  void Set() {
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
    at = Clock::now();
    changed.notify_all();
  }
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return done; });
  }
  bool IsDone() {
    std::lock_guard<std::mutex> lock(mutex);
    return done;
  }
};

// What cudaMalloc or cudaHostAlloc has given.
struct Allocations {
  std::mutex mutex;
  std::map<const char*, size_t> bytes_by_address;

  void* Add(size_t bytes) {
    // The hardware's alignment, and no byte more than was asked for, so that
    // the address sanitizer sees the end.
    void* aligned = nullptr;
    if (posix_memalign(&aligned, 512, std::max(bytes, size_t{1})) != 0) {
      return nullptr;
    }
    // What is read before it is written shows.
    std::memset(aligned, 0xff, bytes);
    std::lock_guard<std::mutex> lock(mutex);
    bytes_by_address[static_cast<char*>(aligned)] = bytes;
    return aligned;
  }
  void Remove(void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      bytes_by_address.erase(static_cast<char*>(data));
    }
    std::free(data);
  }
  // The end of what was given counts: a view that is empty may lie there.
  bool Contains(const void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    auto after =
        bytes_by_address.upper_bound(static_cast<const char*>(address));
    if (after == bytes_by_address.begin()) return false;
    const auto& [begin, bytes] = *--after;
    return static_cast<const char*>(address) <= begin + bytes;
  }
};

// What cudaGetLastError tells this thread.
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t Failed(cudaError_t error) {
  last_error = error;
  return error;
}

// Never destroyed: other static objects may still use them.
Allocations& OfDevice() {
  static Allocations* const allocations = new Allocations;
  return *allocations;
}
Allocations& OfHost() {
  static Allocations* const allocations = new Allocations;
  return *allocations;
}

}  // namespace

namespace gradwire::cuda_emulator {
namespace {

// Hopper, which kernels are written for first.
std::atomic<int> compute_capability = 90;

}  // namespace

int ComputeCapability() { return compute_capability; }
void SetComputeCapability(int capability) { compute_capability = capability; }

}  // namespace gradwire::cuda_emulator

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  // Also of those who run it.
  std::shared_ptr<const std::vector<std::function<void()>>> work;
};

struct CUevent_st {
  std::mutex mutex;
  std::shared_ptr<Recording> latest;  // null: never recorded

  std::shared_ptr<Recording> Latest() {
    std::lock_guard<std::mutex> lock(mutex);
    return latest;
  }
};

CUstream_st::CUstream_st() : thread_([this] { Run(); }) {}

CUstream_st::~CUstream_st() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

void CUstream_st::BeginCapture() {
  std::lock_guard<std::mutex> lock(mutex_);
  captured_ = true;
  spoilt_ = false;
  graph_.clear();
}

bool CUstream_st::IsCaptured() {
  std::lock_guard<std::mutex> lock(mutex_);
  return captured_;
}

void CUstream_st::SpoilCapture() {
  std::lock_guard<std::mutex> lock(mutex_);
  spoilt_ = true;
}

bool CUstream_st::EndCapture(std::vector<std::function<void()>>* out) {
  std::lock_guard<std::mutex> lock(mutex_);
  *out = std::exchange(graph_, {});
  return std::exchange(captured_, false) && !spoilt_;
}

void CUstream_st::Add(std::function<void()> work) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (captured_) {
    graph_.push_back(std::move(work));
    return;
  }
  queue_.push_back(std::move(work));
  changed_.notify_all();
}

void CUstream_st::Synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return queue_.empty() && !running_; });
}

void CUstream_st::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    running_ = true;
    lock.unlock();
    work();
    lock.lock();
    running_ = false;
    changed_.notify_all();
  }
}

namespace gradwire::cuda_emulator {

CUstream_st& StreamOf(cudaStream_t stream) {
  if (LaunchRecord::Of(stream) != nullptr) {
    std::fprintf(stderr, "queued past the record of its section\n");
    std::abort();
  }
  // Never destroyed: other static objects may still use it.
  static CUstream_st* const standard = new CUstream_st;
  return stream == nullptr ? *standard : *stream;
}

bool IsDeviceMemory(const void* address) {
  return OfDevice().Contains(address);
}

}  // namespace gradwire::cuda_emulator

using gradwire::cuda_emulator::StreamOf;

namespace {

// Whether what is asked for on it, which cannot be part of a graph, comes while
// it is captured: the graph is lost then.
bool Captured(cudaStream_t stream) {
  if (!StreamOf(stream).IsCaptured()) return false;
  StreamOf(stream).SpoilCapture();
  return true;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : Failed(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = gradwire::cuda_emulator::ComputeCapability() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = gradwire::cuda_emulator::ComputeCapability() % 10;
      return cudaSuccess;
    // Few, so that work is split as on a GPU.
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    default:
      return Failed(cudaErrorInvalidValue);
  }
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorOfTheEmulator";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "the emulator refused the call";
}

cudaError_t cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = size_t{16} << 30;
  *available = *total;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
  size_t available, total;
  cudaMemGetInfo(&available, &total);
  if (bytes > available) return Failed(cudaErrorMemoryAllocation);
  *data = OfDevice().Add(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  OfDevice().Remove(data);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  *data = OfHost().Add(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeHost(void* data) {
  OfHost().Remove(data);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes,
                            cudaStream_t stream) {
  StreamOf(stream).Add([=] { std::memset(data, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  return cudaMemsetAsync(data, value, bytes, nullptr);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes,
                            cudaMemcpyKind kind, cudaStream_t stream) {
  // A graph would read or write the host's memory as it is by then.
  if (kind != cudaMemcpyDeviceToDevice && Captured(stream)) {
    return Failed(cudaErrorStreamCaptureUnsupported);
  }
  if (kind == cudaMemcpyHostToDevice && !OfHost().Contains(from)) {
    // Memory that is not page-locked has been read when CUDA returns.
    const auto* begin = static_cast<const std::byte*>(from);
    StreamOf(stream).Add(
        [to, staged = std::vector<std::byte>(begin, begin + bytes)] {
          std::memcpy(to, staged.data(), staged.size());
        });
    return cudaSuccess;
  }
  StreamOf(stream).Add([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (Captured(stream)) return Failed(cudaErrorStreamCaptureUnsupported);
  StreamOf(stream).Synchronize();
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event,
                                unsigned) {
  if (Captured(stream)) return Failed(cudaErrorStreamCaptureUnsupported);
  const std::shared_ptr<Recording> latest = event->Latest();
  if (latest) StreamOf(stream).Add([latest] { latest->Wait(); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (Captured(stream)) return Failed(cudaErrorStreamCaptureUnsupported);
  const auto recording = std::make_shared<Recording>();
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->latest = recording;
  }
  StreamOf(stream).Add([recording] { recording->Set(); });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::shared_ptr<Recording> latest = event->Latest();
  return !latest || latest->IsDone() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const std::shared_ptr<Recording> latest = event->Latest();
  if (latest) latest->Wait();
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start,
                                 cudaEvent_t end) {
  const std::shared_ptr<Recording> first = start->Latest();
  const std::shared_ptr<Recording> last = end->Latest();
  if (!first || !last) return Failed(cudaErrorInvalidResourceHandle);
  if (!first->IsDone() || !last->IsDone()) return cudaErrorNotReady;
  *milliseconds =
      std::chrono::duration<float, std::milli>(last->at - first->at).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  // The default stream cannot be.
  if (stream == nullptr || Captured(stream)) {
    return Failed(cudaErrorStreamCaptureUnsupported);
  }
  StreamOf(stream).BeginCapture();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  auto made = std::make_unique<CUgraph_st>();
  if (!StreamOf(stream).EndCapture(&made->work)) {
    *graph = nullptr;
    return Failed(cudaErrorStreamCaptureInvalidated);
  }
  *graph = made.release();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long) {
  *exec = new CUgraphExec_st{
      std::make_shared<const std::vector<std::function<void()>>>(graph->work)};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  StreamOf(stream).Add([all = exec->work] {
    for (const auto& work : *all) work();
  });
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

}  // extern "C"
