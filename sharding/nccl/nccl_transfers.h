// SPDX-License-Identifier: Apache-2.0
// Collectives as work in CUDA streams.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "device/cuda/cuda_device.h"
#include "device/cuda/cuda_event.h"
#include "device/tensor.h"
#include "sharding/nccl/nccl_comm.h"

namespace gradwire {

// Queues collectives, as in Collectives, behind what is in stream() so far, one
// after the other. An error means that the group must end.
// Thread rule: one thread at a time; bytes_sent from any.
class NcclTransfers {
 public:
  // Both must outlive it. Takes `staging_bytes` of the device's memory, but
  // enough for pieces that are worth sending.
  static absl::StatusOr<std::unique_ptr<NcclTransfers>> Create(
      CudaDevice& device, NcclComm& comm, int rank, int world,
      int64_t staging_bytes);

  cudaStream_t stream() const { return stream_->get(); }

  absl::Status AllGather(const Tensor& shard, const Tensor& full);
  absl::Status ReduceScatter(const Tensor& full, int64_t stride,
                             const Tensor& shard, bool accumulate);
  absl::Status AllReduce(const Tensor& values);
  absl::Status Broadcast(const Tensor& values, int root);

  // Waits until both streams are empty.
  void Drain();

  int64_t bytes_sent() const { return bytes_sent_; }

 private:
  // One segment of an array for each rank, `stride` from one to the next; the
  // last may be shorter, or empty. In elements.
  struct Segments {
    int64_t total = 0;
    int64_t each = 0;
    int64_t stride = each;
    int64_t begin(int rank) const { return std::min(rank * stride, total); }
    int64_t size(int rank) const { return std::min(each, total - begin(rank)); }
  };

  NcclTransfers(NcclComm& comm, int rank, int world, int64_t staging_bytes);

  // out = or += the sum over ranks of this rank's segment of their `full`.
  // `out` may be that segment.
  template <typename T>
  absl::Status Reduce(const T* full, const Segments& segments, T* out,
                      bool accumulate);
  template <typename T>
  absl::Status SumAll(T* values, int64_t n);
  // Fills each rank's segment of `full` with that rank's.
  template <typename T>
  absl::Status GatherSegments(T* full, const Segments& segments);

  NcclComm& comm_;
  const int rank_;
  const int world_;
  const int64_t piece_bytes_;
  std::unique_ptr<CudaStream> stream_;
  // Where pieces are added while the next ones arrive.
  std::unique_ptr<CudaStream> sums_;
  // A piece of each peer, twice.
  std::array<std::unique_ptr<DeviceBuffer>, 2> staging_;
  std::array<CudaEvent, 2> arrived_;
  std::array<CudaEvent, 2> added_;
  CudaEvent ready_;
  std::atomic<int64_t> bytes_sent_{0};
};

}  // namespace gradwire
