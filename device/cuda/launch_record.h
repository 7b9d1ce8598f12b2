// SPDX-License-Identifier: Apache-2.0
// What a section of a stream (Stream::Section) is made of, before it is queued.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "device/cuda/cuda_status.h"

namespace gradwire {

// Calls that queue work on a stream ask for its record, and if there is one add
// themselves to it: what they do, and every value that decides what they do, so
// that two records of the same bytes do the same work on the same memory. A
// call that does not ask would come before all that was recorded; the emulator
// ends the process then.
class LaunchRecord {
 public:
  using Issue = std::function<absl::Status(cudaStream_t)>;

  // In place of a kernel's address, which none of them is.
  enum Call : uint64_t { kMemset = 1, kCopy, kProduct };

  explicit LaunchRecord(cudaStream_t stream) : stream_(stream) {}
  LaunchRecord(const LaunchRecord&) = delete;
  LaunchRecord& operator=(const LaunchRecord&) = delete;

  // The one that this thread records what it queues on `stream` in, or null.
  static LaunchRecord* Of(cudaStream_t stream) {
    return current_ != nullptr && current_->stream_ == stream ? current_
                                                              : nullptr;
  }

  // Runs `body` with this as the record of its stream.
  void Take(const std::function<void()>& body) {
    LaunchRecord* const before = std::exchange(current_, this);
    body();
    current_ = before;
  }

  // `what` is a Call or a kernel, which decides the types of `values`.
  template <typename... Values>
  void Add(Issue issue, uint64_t what, const Values&... values) {
    Append(what);
    (Append(values), ...);
    calls_.push_back({std::move(issue), false});
  }
  // What reads memory of the host: the next time it has other contents. The
  // caller is told that it is on its way, and may count on it.
  void AddOnce(Issue issue) {
    repeats_ = false;
    calls_.push_back({std::move(issue), true});
  }

  // Whether the bytes say all.
  bool repeats() const { return repeats_ && !calls_.empty(); }
  const std::string& bytes() const { return bytes_; }

  // Queues it all, up to the first failure, which it returns; behind that what
  // was added once.
  absl::Status IssueTo(cudaStream_t stream) const {
    absl::Status first;
    for (const Recorded& call : calls_) {
      if (first.ok() || call.once) first.Update(call.issue(stream));
    }
    return first;
  }

 private:
  template <typename T>
  void Append(T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    // Or two of the same values differ.
    __builtin_clear_padding(&value);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  struct Recorded {
    Issue issue;
    bool once;
  };

  static inline thread_local LaunchRecord* current_ = nullptr;

  const cudaStream_t stream_;
  std::string bytes_;
  std::vector<Recorded> calls_;
  bool repeats_ = true;
};

// issue(stream), a call of CUDA's runtime that queues, or its record: see Add.
// `operation` is for CudaStatus.
template <typename Issue, typename... Values>
cudaError_t QueueOrRecord(cudaStream_t stream, const char* operation,
                          const Issue& issue, uint64_t what,
                          const Values&... values) {
  LaunchRecord* const record = LaunchRecord::Of(stream);
  if (record == nullptr) return issue(stream);
  record->Add([issue, operation](
                  cudaStream_t to) { return CudaStatus(issue(to), operation); },
              what, values...);
  return cudaSuccess;
}

// launch(stream), which queues the kernel with these arguments, or its record.
template <typename... Parameters, typename Launch, typename... Arguments>
cudaError_t QueueKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        std::size_t shared_bytes, cudaStream_t stream,
                        const Launch& launch, const Arguments&... arguments) {
  return QueueOrRecord(
      stream, "a kernel", launch, reinterpret_cast<uint64_t>(kernel), grid,
      block, shared_bytes, static_cast<std::decay_t<Parameters>>(arguments)...);
}

// CUDA's calls of these names, or their records.
cudaError_t QueueMemset(void* data, int value, int64_t bytes,
                        cudaStream_t stream);
// Within the device; the two do not overlap.
cudaError_t QueueCopy(void* to, const void* from, int64_t bytes,
                      cudaStream_t stream);
// From memory of the host that is not page-locked, and may change afterwards.
cudaError_t QueueCopyFromHost(void* to, const void* from, int64_t bytes,
                              cudaStream_t stream);

}  // namespace gradwire
