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

// Thread rule: all methods from any thread; they wait for each other. REQUIRES:
// the device is the thread's current one, also at the end.
class PinnedRing {
 public:
  // A copy goes in pieces of at most a quarter of `bytes`.
  // Errors: RESOURCE_EXHAUSTED OUT_OF_MEMORY; DEVICE_FAILED.
  static absl::StatusOr<std::unique_ptr<PinnedRing>> Create(int64_t bytes);
  // REQUIRES: all that went through it has been done.
  ~PinnedRing();
  PinnedRing(const PinnedRing&) = delete;

  // Queues a copy; `from` may change when it returns. Waits for the device only
  // as long as the ring is full of what that has not copied yet.
  void CopyFromHost(CudaStream& stream, const void* from, void* to,
                    int64_t bytes);
  // What the stream has queued has been done, and `to` holds the bytes, when it
  // returns: one piece is copied by the device while the host takes the last.
  void CopyToHost(CudaStream& stream, const void* from, void* to,
                  int64_t bytes);

 private:
  struct Piece {
    int64_t begin;
    CudaEvent used;  // by the device, for the last time
  };

  PinnedRing(char* memory, int64_t bytes) : memory_(memory), bytes_(bytes) {}

  // Room for `bytes`, that nothing uses any more.
  char* Reserve(CudaStream& stream, int64_t bytes);
  // The room is used until `stream` has come to where it is now.
  void Release(CudaStream& stream, const char* room);
  void DropOldest(CudaStream& stream);
  CudaEvent TakeEvent();

  char* const memory_;
  const int64_t bytes_;

  std::mutex mutex_;
  // All below is guarded by it.
  std::deque<Piece>
      pieces_;  // oldest first: in the ring's order, from next_ on
  std::vector<CudaEvent> spare_;
  int64_t next_ = 0;
};

}  // namespace gradwire
