// SPDX-License-Identifier: Apache-2.0
#include "sharding/nccl/nccl_transfers.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/status.h"
#include "device/cuda/cuda_status.h"
#include "sharding/nccl/rank_sum_cuda.h"

namespace gradwire {
namespace {

constexpr int64_t kMinPieceBytes = 32 << 10;
// Up to here a sum over ranks takes one exchange of everything with everybody,
// in place of two exchanges of a part. Fits in a piece.
constexpr int64_t kSmallBytes = kMinPieceBytes;

// Of one peer, of which there is room for two.
int64_t PieceBytes(int world, int64_t staging_bytes) {
  if (world == 1) return 0;
  return std::max(staging_bytes / 2 / (world - 1) / 4096 * 4096,
                  kMinPieceBytes);
}

ncclDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ncclFloat32;
    case DType::kF64:
      return ncclFloat64;
    case DType::kBF16:
      return ncclBfloat16;
    case DType::kI16:
      return ncclFloat16;  // moved, never added
    case DType::kI32:
      return ncclInt32;
    case DType::kI64:
      return ncclInt64;
  }
  return ncclInt8;
}

template <typename T>
constexpr ncclDataType_t kTypeOf = sizeof(T) == 4 ? ncclFloat32 : ncclFloat64;

// Keeps the first result that is an error.
void Keep(ncclResult_t result, ncclResult_t& first) {
  if (first == ncclSuccess && result != ncclInProgress) first = result;
}

absl::Status Do(cudaError_t error) {
  return CudaStatus(error, "a sum over ranks");
}

}  // namespace

NcclTransfers::NcclTransfers(NcclComm& comm, int rank, int world,
                             int64_t staging_bytes)
    : comm_(comm),
      rank_(rank),
      world_(world),
      piece_bytes_(PieceBytes(world, staging_bytes)) {}

absl::StatusOr<std::unique_ptr<NcclTransfers>> NcclTransfers::Create(
    CudaDevice& device, NcclComm& comm, int rank, int world,
    int64_t staging_bytes) {
  std::unique_ptr<NcclTransfers> made(
      new NcclTransfers(comm, rank, world, staging_bytes));
  device.MakeCurrent();
  made->stream_ = std::make_unique<CudaStream>();
  GW_RETURN_IF_ERROR(made->stream_->Finish());
  made->sums_ = std::make_unique<CudaStream>();
  GW_RETURN_IF_ERROR(made->sums_->Finish());
  for (auto& half : made->staging_) {
    if (world == 1) continue;
    GW_ASSIGN_OR_RETURN(half,
                        device.Allocate((world - 1) * made->piece_bytes_));
  }
  return made;
}

absl::Status NcclTransfers::AllGather(const Tensor& shard, const Tensor& full) {
  if (shard.bytes() == 0) return absl::OkStatus();
  bytes_sent_ += shard.bytes() * (world_ - 1);
  return comm_.Run([&](ncclComm_t comm) {
    return ncclAllGather(shard.raw(), full.raw(),
                         static_cast<size_t>(shard.num_elements()),
                         TypeOf(shard.dtype()), comm, stream());
  });
}

absl::Status NcclTransfers::ReduceScatter(const Tensor& full, int64_t stride,
                                          const Tensor& shard,
                                          bool accumulate) {
  return Reduce<float>(full.data<float>(),
                       {full.num_elements(), shard.num_elements(), stride},
                       shard.data<float>(), accumulate);
}

absl::Status NcclTransfers::AllReduce(const Tensor& values) {
  const int64_t n = values.num_elements();
  if (n == 0) return absl::OkStatus();
  return values.dtype() == DType::kF32 ? SumAll(values.data<float>(), n)
                                       : SumAll(values.data<double>(), n);
}

absl::Status NcclTransfers::Broadcast(const Tensor& values, int root) {
  if (values.bytes() == 0) return absl::OkStatus();
  if (rank_ == root) bytes_sent_ += values.bytes() * (world_ - 1);
  return comm_.Run([&](ncclComm_t comm) {
    return ncclBroadcast(values.raw(), values.raw(),
                         static_cast<size_t>(values.num_elements()),
                         TypeOf(values.dtype()), root, comm, stream());
  });
}

void NcclTransfers::Drain() {
  cudaStreamSynchronize(stream_->get());
  cudaStreamSynchronize(sums_->get());
}

template <typename T>
absl::Status NcclTransfers::Reduce(const T* full, const Segments& segments,
                                   T* out, bool accumulate) {
  constexpr int64_t kBytes = sizeof(T);
  const T* own = full + segments.begin(rank_);
  if (world_ == 1) {
    return Do(SumInRankOrder<T>({own, own, 0, 0, 1}, segments.size(0), out,
                                accumulate, stream()));
  }
  const int64_t piece = piece_bytes_ / kBytes;
  // Sums begin when what is before this in the stream is done.
  GW_RETURN_IF_ERROR(Do(ready_.Record(stream())));
  GW_RETURN_IF_ERROR(Do(ready_.HoldUp(sums_->get())));
  // All ranks take as many turns as the longest segment needs.
  for (int64_t begin = 0, turn = 0; begin < segments.each;
       begin += piece, ++turn) {
    const size_t half = static_cast<size_t>(turn % 2);
    T* staging = static_cast<T*>(staging_[half]->data());
    const auto size = [&](int rank) {
      return std::clamp<int64_t>(segments.size(rank) - begin, 0, piece);
    };
    const auto count = [&](int rank) {
      return static_cast<size_t>(size(rank));
    };
    GW_RETURN_IF_ERROR(Do(added_[half].HoldUp(stream())));
    GW_RETURN_IF_ERROR(comm_.Run([&](ncclComm_t comm) {
      ncclResult_t result = ncclSuccess;
      T* place = staging;
      for (int peer = 0; peer < world_; ++peer) {
        if (peer == rank_) continue;
        if (size(rank_) > 0) {
          Keep(ncclRecv(place, count(rank_), kTypeOf<T>, peer, comm, stream()),
               result);
        }
        if (size(peer) > 0) {
          Keep(ncclSend(full + segments.begin(peer) + begin, count(peer),
                        kTypeOf<T>, peer, comm, stream()),
               result);
          bytes_sent_ += size(peer) * kBytes;
        }
        place += piece;
      }
      return result;
    }));
    GW_RETURN_IF_ERROR(Do(arrived_[half].Record(stream())));
    GW_RETURN_IF_ERROR(Do(arrived_[half].HoldUp(sums_->get())));
    GW_RETURN_IF_ERROR(Do(
        SumInRankOrder<T>({own + begin, staging, piece, rank_, world_},
                          size(rank_), out + begin, accumulate, sums_->get())));
    GW_RETURN_IF_ERROR(Do(added_[half].Record(sums_->get())));
  }
  for (const CudaEvent& added : added_) {
    GW_RETURN_IF_ERROR(Do(added.HoldUp(stream())));
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status NcclTransfers::SumAll(T* values, int64_t n) {
  constexpr int64_t kBytes = sizeof(T);
  if (world_ == 1) return absl::OkStatus();
  if (n * kBytes <= kSmallBytes) {
    // Everybody sends everything: own values to each peer's staging.
    T* staging = static_cast<T*>(staging_[0]->data());
    GW_RETURN_IF_ERROR(Do(added_[0].HoldUp(stream())));
    GW_RETURN_IF_ERROR(comm_.Run([&](ncclComm_t comm) {
      ncclResult_t result = ncclSuccess;
      T* place = staging;
      for (int peer = 0; peer < world_; ++peer) {
        if (peer == rank_) continue;
        const auto count = static_cast<size_t>(n);
        Keep(ncclRecv(place, count, kTypeOf<T>, peer, comm, stream()), result);
        Keep(ncclSend(values, count, kTypeOf<T>, peer, comm, stream()), result);
        bytes_sent_ += n * kBytes;
        place += n;
      }
      return result;
    }));
    return Do(SumInRankOrder<T>({values, staging, n, rank_, world_}, n, values,
                                /*accumulate=*/false, stream()));
  }
  const Segments segments = {n, (n + world_ - 1) / world_};
  GW_RETURN_IF_ERROR(Reduce<T>(values, segments, values + segments.begin(rank_),
                               /*accumulate=*/false));
  return GatherSegments(values, segments);
}

template <typename T>
absl::Status NcclTransfers::GatherSegments(T* full, const Segments& segments) {
  bytes_sent_ +=
      segments.size(rank_) * static_cast<int64_t>(sizeof(T)) * (world_ - 1);
  return comm_.Run([&](ncclComm_t comm) {
    if (segments.each * world_ == segments.total) {
      return ncclAllGather(full + segments.begin(rank_), full,
                           static_cast<size_t>(segments.each), kTypeOf<T>, comm,
                           stream());
    }
    ncclResult_t result = ncclSuccess;
    for (int root = 0; root < world_; ++root) {
      if (segments.size(root) == 0) continue;
      T* segment = full + segments.begin(root);
      Keep(ncclBroadcast(segment, segment,
                         static_cast<size_t>(segments.size(root)), kTypeOf<T>,
                         root, comm, stream()),
           result);
    }
    return result;
  });
}

}  // namespace gradwire
