// SPDX-License-Identifier: Apache-2.0
// Page-locked memory of the host, through which copies to and from a GPU go.
// What CUDA copies from memory that is not page-locked makes it wait for the
// stream, and what it copies to such memory it copies slowly.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/statusor.h"
#include "device/cuda/cuda_event.h"

namespace gradwire {

class CudaStream;

// Thread rule: all methods from any thread. None waits for what another
// thread's stream waits for, which may be that this thread goes on. REQUIRES:
// the device is the thread's current one, also at the end.
class PinnedRing {
 public:
  // A copy goes in pieces of at most a quarter of `bytes`.
  // Errors: RESOURCE_EXHAUSTED OUT_OF_MEMORY; DEVICE_FAILED.
  static absl::StatusOr<std::unique_ptr<PinnedRing>> Create(int64_t bytes);
  // REQUIRES: all that went through it has been done.
  ~PinnedRing();
  PinnedRing(const PinnedRing&) = delete;

  // Queues a copy; `from` may change when it returns. Waits for `stream` only
  // as long as the ring is full of what that has not copied yet; of what is
  // full of other streams' copies, the ring is not used.
  void CopyFromHost(CudaStream& stream, const void* from, void* to,
                    int64_t bytes);
  // What the stream has queued has been done, and `to` holds the bytes, when it
  // returns: one piece is copied by the device while the host takes the last.
  void CopyToHost(CudaStream& stream, const void* from, void* to,
                  int64_t bytes);

 private:
  struct Piece {
    int64_t begin;
    cudaStream_t stream;
    std::shared_ptr<CudaEvent> used;  // by the device, for the last time
  };

  PinnedRing(char* memory, int64_t bytes) : memory_(memory), bytes_(bytes) {}

  // REQUIRES of all: the mutex.
  // Room for `bytes` that nothing uses any more; null: the oldest piece is
  // used.
  char* Reserve(CudaStream& stream, int64_t bytes);
  bool DropOldest(CudaStream& stream);
  std::shared_ptr<CudaEvent> TakeEvent();

  char* const memory_;
  const int64_t bytes_;

  std::mutex mutex_;
  // All below is guarded by it.
  std::deque<Piece>
      pieces_;  // oldest first: in the ring's order, from next_ on
  std::vector<std::shared_ptr<CudaEvent>> spare_;
  int64_t next_ = 0;
};

}  // namespace gradwire
