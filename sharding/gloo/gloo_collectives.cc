// SPDX-License-Identifier: Apache-2.0
#include "sharding/gloo/gloo_collectives.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/status.h"
#include "sharding/gloo/gloo_mesh.h"
#include "sharding/queued_collectives.h"
#include "sharding/rank_sum.h"

namespace gradwire {
namespace {

// Sums travel in pieces of at most this, so that one is added while the next
// is on its way.
constexpr int64_t kMaxPieceBytes = 1 << 20;
// Pieces of all peers, two of each.
constexpr int64_t kMaxScratchBytes = 64 << 20;
// Up to here a sum over ranks takes one exchange of everything with everybody,
// in place of two exchanges of a part. Fits in a piece.
constexpr int64_t kSmallBytes = 32 << 10;

int64_t PieceBytes(int world) {
  if (world == 1) return 0;
  const int64_t share = kMaxScratchBytes / (2 * (world - 1));
  return std::clamp(share / 4096 * 4096, kSmallBytes, kMaxPieceBytes);
}

// One segment of an array for each rank; the last may be shorter, or empty.
struct Segments {
  int64_t total = 0;      // elements of the array
  int64_t each = 0;       // elements of a segment
  int64_t stride = each;  // from one to the next

  int64_t begin(int rank) const { return std::min(rank * stride, total); }
  int64_t size(int rank) const { return std::min(each, total - begin(rank)); }
};

class GlooCollectives : public BlockingCollectives {
 public:
  explicit GlooCollectives(std::unique_ptr<GlooMesh> mesh)
      : mesh_(std::move(mesh)),
        piece_bytes_(PieceBytes(mesh_->world())),
        scratch_(std::make_unique_for_overwrite<double[]>(
            static_cast<size_t>(2 * (mesh_->world() - 1) * piece_bytes_ /
                                static_cast<int64_t>(sizeof(double))))) {}

  int rank() const override { return mesh_->rank(); }
  int world() const override { return mesh_->world(); }

  absl::Status AllGather(const Tensor& shard, const Tensor& full) override {
    GW_RETURN_IF_ERROR(mesh_->Begin());
    return Gather(static_cast<char*>(shard.raw()),
                  {full.bytes(), shard.bytes()},
                  static_cast<char*>(full.raw()));
  }

  absl::Status ReduceScatterParts(const Tensor& full, int64_t stride,
                                  const Tensor& shard,
                                  bool accumulate) override {
    GW_RETURN_IF_ERROR(mesh_->Begin());
    return Reduce(full.data<float>(),
                  {full.num_elements(), shard.num_elements(), stride},
                  shard.data<float>(), accumulate);
  }

  absl::Status AllReduce(const Tensor& values) override {
    GW_RETURN_IF_ERROR(mesh_->Begin());
    return values.dtype() == DType::kF32 ? SumAll<float>(values)
                                         : SumAll<double>(values);
  }

  absl::Status Broadcast(const Tensor& values, int root) override {
    GW_RETURN_IF_ERROR(mesh_->Begin());
    std::vector<GlooTransfer> transfers;
    for (const int peer : Peers()) {
      if (rank() != root && peer != root) continue;
      transfers.emplace_back(mesh_.get(), peer, values.raw(), values.bytes());
      if (rank() == root) {
        transfers.back().Send(0, values.bytes());
      } else {
        transfers.back().Receive(0, values.bytes());
      }
    }
    return WaitAll(transfers);
  }

  void Interrupt() override { mesh_->Interrupt(); }
  void End() override { (void)mesh_->End(); }
  int64_t bytes_sent() const override { return mesh_->bytes_sent(); }

 private:
  // The others, from the next one on, so that not all begin with the same.
  std::vector<int> Peers() const {
    std::vector<int> peers;
    for (int i = 1; i < world(); ++i) peers.push_back((rank() + i) % world());
    return peers;
  }

  static absl::Status WaitAll(std::vector<GlooTransfer>& transfers) {
    for (GlooTransfer& transfer : transfers) {
      GW_RETURN_IF_ERROR(transfer.Wait());
    }
    return absl::OkStatus();
  }

  // Room for a piece of a peer.
  template <typename T>
  T* Scratch(int peer, int half) {
    const int64_t index = 2 * (peer < rank() ? peer : peer - 1) + half;
    return reinterpret_cast<T*>(scratch_.get() +
                                index * piece_bytes_ /
                                    static_cast<int64_t>(sizeof(double)));
  }

  // full = the ranks' segments, of which this one's is at `mine`. In bytes.
  absl::Status Gather(char* mine, const Segments& bytes, char* full) {
    std::vector<GlooTransfer> transfers;
    for (const int peer : Peers()) {
      transfers.emplace_back(mesh_.get(), peer, full + bytes.begin(peer),
                             bytes.size(peer));
      transfers.back().Receive(0, bytes.size(peer));
    }
    for (const int peer : Peers()) {
      transfers.emplace_back(mesh_.get(), peer, mine, bytes.size(rank()));
      transfers.back().Send(0, bytes.size(rank()));
    }
    char* place = full + bytes.begin(rank());
    if (place != mine && bytes.size(rank()) > 0) {
      std::memcpy(place, mine, static_cast<size_t>(bytes.size(rank())));
    }
    return WaitAll(transfers);
  }

  // out = or += the sum over ranks of this rank's segment of their `full`.
  // `out` may be that segment.
  template <typename T>
  absl::Status Reduce(T* full, const Segments& segments, T* out,
                      bool accumulate) {
    constexpr int64_t kBytes = sizeof(T);
    const int64_t n = segments.size(rank());
    const int64_t piece = piece_bytes_ / kBytes;
    // Of each peer, in rank order, one for even pieces and one for odd ones.
    std::vector<GlooTransfer> halves[2];
    const auto size = [&](int64_t begin) {
      return std::clamp<int64_t>(n - begin, 0, piece);
    };
    for (int half = 0; half < 2; ++half) {
      for (int peer = 0; peer < world(); ++peer) {
        if (peer == rank()) continue;
        halves[half].emplace_back(mesh_.get(), peer, Scratch<T>(peer, half),
                                  piece_bytes_);
        halves[half].back().Receive(0, size(half * piece) * kBytes);
      }
    }
    std::vector<GlooTransfer> sends;
    for (const int peer : Peers()) {
      const int64_t bytes = segments.size(peer) * kBytes;
      sends.emplace_back(mesh_.get(), peer, full + segments.begin(peer), bytes);
      for (int64_t at = 0; at < bytes; at += piece_bytes_) {
        sends.back().Send(at, std::min(piece_bytes_, bytes - at));
      }
    }
    std::vector<const T*> parts(static_cast<size_t>(world()));
    const int64_t step = world() == 1 ? std::max<int64_t>(n, 1) : piece;
    for (int64_t begin = 0, half = 0; begin < n; begin += step, half ^= 1) {
      GW_RETURN_IF_ERROR(WaitAll(halves[half]));
      for (int r = 0; r < world(); ++r) {
        parts[static_cast<size_t>(r)] =
            r == rank() ? full + segments.begin(r) + begin
                        : Scratch<T>(r, static_cast<int>(half));
      }
      SumInRankOrder<T>(parts, std::min(step, n - begin), out + begin,
                        accumulate);
      for (GlooTransfer& next : halves[half]) {
        next.Receive(0, size(begin + 2 * piece) * kBytes);
      }
    }
    return WaitAll(sends);
  }

  template <typename T>
  absl::Status SumAll(const Tensor& tensor) {
    const int64_t n = tensor.num_elements();
    T* values = tensor.data<T>();
    if (tensor.bytes() <= kSmallBytes) {
      std::vector<GlooTransfer> transfers;
      for (const int peer : Peers()) {
        transfers.emplace_back(mesh_.get(), peer, Scratch<T>(peer, 0),
                               piece_bytes_);
        transfers.back().Receive(0, tensor.bytes());
      }
      for (const int peer : Peers()) {
        transfers.emplace_back(mesh_.get(), peer, values, tensor.bytes());
        transfers.back().Send(0, tensor.bytes());
      }
      GW_RETURN_IF_ERROR(WaitAll(transfers));
      std::vector<const T*> parts;
      for (int r = 0; r < world(); ++r) {
        parts.push_back(r == rank() ? values : Scratch<T>(r, 0));
      }
      SumInRankOrder<T>(parts, n, values, /*accumulate=*/false);
      return absl::OkStatus();
    }
    const int64_t each = (n + world() - 1) / world();
    const Segments segments = {n, each};
    T* mine = values + segments.begin(rank());
    GW_RETURN_IF_ERROR(Reduce(values, segments, mine, /*accumulate=*/false));
    constexpr int64_t kBytes = sizeof(T);
    return Gather(reinterpret_cast<char*>(mine), {n * kBytes, each * kBytes},
                  reinterpret_cast<char*>(values));
  }

  const std::unique_ptr<GlooMesh> mesh_;
  const int64_t piece_bytes_;
  const std::unique_ptr<double[]> scratch_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Collectives>> NewGlooCollectives(
    const GlooOptions& options, const ExchangeAddresses& exchange) {
  GW_ASSIGN_OR_RETURN(std::unique_ptr<GlooMesh> mesh,
                      GlooMesh::Connect(options, exchange));
  return NewQueuedCollectives(
      std::make_unique<GlooCollectives>(std::move(mesh)));
}

}  // namespace gradwire
