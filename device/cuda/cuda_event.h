// SPDX-License-Identifier: Apache-2.0
// A point in the work of a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

namespace gradwire {

// Made when it is first recorded. Thread rule: one thread at a time; Wait and
// Query from any, if none records.
class CudaEvent {
 public:
  // `timed`: Seconds can be asked for; costs a little.
  explicit CudaEvent(bool timed = false) : timed_(timed) {}
  ~CudaEvent() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  CudaEvent(CudaEvent&& other) noexcept
      : timed_(other.timed_), event_(std::exchange(other.event_, nullptr)) {}
  CudaEvent& operator=(CudaEvent&& other) noexcept {
    std::swap(timed_, other.timed_);
    std::swap(event_, other.event_);
    return *this;
  }

  cudaError_t Record(cudaStream_t stream) {
    if (event_ == nullptr) {
      const cudaError_t made = cudaEventCreateWithFlags(
          &event_, timed_ ? cudaEventDefault : cudaEventDisableTiming);
      if (made != cudaSuccess) return made;
    }
    return cudaEventRecord(event_, stream);
  }
  // What comes later in `stream` waits for the last Record; if there was none,
  // for nothing.
  cudaError_t HoldUp(cudaStream_t stream) const {
    return event_ == nullptr ? cudaSuccess
                             : cudaStreamWaitEvent(stream, event_, 0);
  }
  // cudaSuccess: the device has come to the last Record; cudaErrorNotReady; or
  // what has gone wrong.
  cudaError_t Query() const {
    return event_ == nullptr ? cudaSuccess : cudaEventQuery(event_);
  }
  // Waits until the device has come to the last Record; what has gone wrong.
  cudaError_t Wait() const {
    return event_ == nullptr ? cudaSuccess : cudaEventSynchronize(event_);
  }
  // From `start` to this; 0 unless both are timed and done.
  double SecondsSince(const CudaEvent& start) const {
    float milliseconds = 0;
    if (event_ == nullptr || start.event_ == nullptr ||
        cudaEventElapsedTime(&milliseconds, start.event_, event_) !=
            cudaSuccess) {
      (void)cudaGetLastError();
      return 0;
    }
    return static_cast<double>(milliseconds) * 1e-3;
  }

 private:
  bool timed_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace gradwire
