// SPDX-License-Identifier: Apache-2.0
#include "device/cuda/pinned_ring.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/status.h"
#include "device/cuda/cuda_device.h"
#include "device/cuda/cuda_status.h"

namespace gradwire {
namespace {

// Of each piece's place.
constexpr int64_t kAlignment = 64;

}  // namespace

absl::StatusOr<std::unique_ptr<PinnedRing>> PinnedRing::Create(int64_t bytes) {
  GW_CHECK(bytes >= 4 * kAlignment && bytes % (4 * kAlignment) == 0);
  void* memory = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // It is told here, not by the next call.
    return ErrorBuilder(absl::StatusCode::kResourceExhausted, "OUT_OF_MEMORY")
        .Server()
        .With("value", bytes)
        .Message("the machine refused " + std::to_string(bytes) +
                 " bytes of page-locked memory; free some of its memory");
  }
  GW_RETURN_IF_ERROR(CudaStatus(error, "allocating page-locked memory"));
  return std::unique_ptr<PinnedRing>(
      new PinnedRing(static_cast<char*>(memory), bytes));
}

PinnedRing::~PinnedRing() { cudaFreeHost(memory_); }

bool PinnedRing::DropOldest(CudaStream& stream) {
  Piece& oldest = pieces_.front();
  const cudaError_t used = oldest.used->Query();
  if (used == cudaErrorNotReady) return false;
  stream.Check(used, "a copy");
  spare_.push_back(std::move(oldest.used));
  pieces_.pop_front();
  return true;
}

char* PinnedRing::Reserve(CudaStream& stream, int64_t bytes) {
  GW_CHECK(bytes <= bytes_ / 4);
  // Not a whole ring of pieces that are long done, each with its event.
  for (int i = 0; i < 2 && !pieces_.empty() && DropOldest(stream); ++i) {
  }
  if (next_ + bytes > bytes_) {
    // What lies from here to the end is oldest.
    while (!pieces_.empty() && pieces_.front().begin >= next_) {
      if (!DropOldest(stream)) return nullptr;
    }
    next_ = 0;
  }
  while (!pieces_.empty() && pieces_.front().begin >= next_ &&
         pieces_.front().begin < next_ + bytes) {
    if (!DropOldest(stream)) return nullptr;
  }
  char* const room = memory_ + next_;
  next_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return room;
}

std::shared_ptr<CudaEvent> PinnedRing::TakeEvent() {
  // Somebody may still wait for one that is spare.
  for (auto& spare : spare_) {
    if (spare.use_count() > 1) continue;
    std::shared_ptr<CudaEvent> event = std::move(spare);
    spare = std::move(spare_.back());
    spare_.pop_back();
    return event;
  }
  return std::make_shared<CudaEvent>();
}

void PinnedRing::CopyFromHost(CudaStream& stream, const void* from, void* to,
                              int64_t bytes) {
  for (int64_t at = 0; at < bytes && stream.ok();) {
    const int64_t part = std::min(bytes - at, bytes_ / 4);
    const char* source = static_cast<const char*>(from) + at;
    std::shared_ptr<CudaEvent> own;  // a copy of this stream is in the way
    std::unique_lock<std::mutex> lock(mutex_);
    char* const room = Reserve(stream, part);
    if (room != nullptr) {
      std::memcpy(room, source, static_cast<size_t>(part));
      source = room;
    } else {
      if (pieces_.front().stream == stream.get()) own = pieces_.front().used;
      lock.unlock();
    }
    if (own != nullptr) {
      stream.Check(own->Wait(), "a copy");
      continue;
    }
    stream.Check(cudaMemcpyAsync(static_cast<char*>(to) + at, source,
                                 static_cast<size_t>(part),
                                 cudaMemcpyHostToDevice, stream.get()),
                 "a copy from the host");
    if (room != nullptr) {
      Piece piece = {room - memory_, stream.get(), TakeEvent()};
      stream.Check(piece.used->Record(stream.get()), "a copy");
      pieces_.push_back(std::move(piece));
    }
    at += part;
  }
}

void PinnedRing::CopyToHost(CudaStream& stream, const void* from, void* to,
                            int64_t bytes) {
  // What comes before it may take long; the copies do not.
  stream.Check(cudaStreamSynchronize(stream.get()), "a copy to the host");
  const std::lock_guard<std::mutex> lock(mutex_);
  struct Flight {
    const char* room;
    int64_t at, part;
    std::shared_ptr<CudaEvent> arrived;
  };
  std::deque<Flight> flights;
  const auto land = [&] {
    Flight& first = flights.front();
    stream.Check(first.arrived->Wait(), "a copy to the host");
    std::memcpy(static_cast<char*>(to) + first.at, first.room,
                static_cast<size_t>(first.part));
    spare_.push_back(std::move(first.arrived));
    flights.pop_front();
  };
  for (int64_t at = 0; at < bytes && stream.ok();) {
    const int64_t part = std::min(bytes - at, bytes_ / 4);
    // A room is taken again only by the third piece after it.
    if (flights.size() == 2) land();
    char* const room = Reserve(stream, part);
    char* const target = room != nullptr ? room : static_cast<char*>(to) + at;
    stream.Check(cudaMemcpyAsync(target, static_cast<const char*>(from) + at,
                                 static_cast<size_t>(part),
                                 cudaMemcpyDeviceToHost, stream.get()),
                 "a copy to the host");
    if (room != nullptr) {
      Flight flight = {room, at, part, TakeEvent()};
      stream.Check(flight.arrived->Record(stream.get()), "a copy to the host");
      flights.push_back(std::move(flight));
    }
    at += part;
  }
  while (!flights.empty()) land();
  stream.Check(cudaStreamSynchronize(stream.get()), "a copy to the host");
}

}  // namespace gradwire
