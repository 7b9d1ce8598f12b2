// SPDX-License-Identifier: Apache-2.0
#include "sharding/nccl/replicated_nccl.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/status.h"
#include "device/cuda/cuda_event.h"
#include "device/cuda/cuda_status.h"
#include "sharding/nccl/rank_sum_cuda.h"

namespace gradwire {
namespace {

// Older tickets are waited for together.
constexpr size_t kMaxEntries = 64;

class ReplicatedNccl : public Collectives {
 public:
  ReplicatedNccl(CudaDevice& device, std::unique_ptr<Collectives> shards,
                 std::unique_ptr<Collectives> replicas, int64_t sum_bytes)
      : device_(device),
        piece_(sum_bytes / 4),
        shards_(std::move(shards)),
        replicas_(std::move(replicas)) {}

  ~ReplicatedNccl() override {
    device_.MakeCurrent();
    // When they have ended, nothing that the lanes wait for is still to come.
    shards_.reset();
    replicas_.reset();
    for (Lane& lane : lanes_) (void)lane.stream.Finish();
  }

  absl::Status AllocateSums() {
    for (Lane& lane : lanes_) {
      GW_ASSIGN_OR_RETURN(lane.sum, device_.Allocate(piece_ * 4));
    }
    return absl::OkStatus();
  }

  int rank() const override { return shards_->rank(); }
  int world() const override { return shards_->world(); }

  Ticket AllGather(Stream& stream, const Tensor& shard,
                   const Tensor& full) override {
    return Add({.shards = shards_->AllGather(stream, shard, full)});
  }
  Ticket AllReduce(Stream& stream, const Tensor& values) override {
    return Add({.shards = shards_->AllReduce(stream, values)});
  }
  Ticket Broadcast(Stream& stream, const Tensor& values, int root) override {
    return Add({.shards = shards_->Broadcast(stream, values, root)});
  }

  Ticket ReduceScatterParts(Stream& stream, const Tensor& full, int64_t stride,
                            const Tensor& shard, bool accumulate) override {
    device_.MakeCurrent();
    auto& from = static_cast<CudaStream&>(stream);
    Entry entry;
    if (!accumulate) {
      Lane& lane = NextLane(from);
      SumInto(lane, full, stride, shard, entry);
      Mark(lane, entry);
      return Add(std::move(entry));
    }
    const int64_t n = shard.num_elements();
    for (int64_t at = 0; at < n; at += piece_) {
      const int64_t part = std::min(piece_, n - at);
      Lane& lane = NextLane(from);
      const Tensor sum(lane.sum->data(), DType::kF32, {part});
      SumInto(lane, full.Rows(at, at + (shards_->world() - 1) * stride + part),
              stride, sum, entry);
      const RankParts<float> parts = {.own = sum.data<float>(),
                                      .others = nullptr,
                                      .stride = 0,
                                      .rank = 0,
                                      .world = 1};
      Check(SumInRankOrder<float>(parts, part, shard.data<float>() + at, true,
                                  lane.stream.get()));
      Mark(lane, entry);
    }
    return Add(std::move(entry));
  }

  absl::Status Wait(Stream& stream, Ticket ticket) override {
    GW_CHECK(0 < ticket && ticket <= last_);
    device_.MakeCurrent();
    const auto index = ticket - (last_ - static_cast<Ticket>(entries_.size()));
    const Entry& entry =
        index > 0 ? entries_[static_cast<size_t>(index - 1)] : older_;
    absl::Status status;
    if (entry.shards > 0) status = shards_->Wait(stream, entry.shards);
    if (status.ok() && entry.replicas > 0) {
      status = replicas_->Wait(stream, entry.replicas);
    }
    if (!status.ok()) {
      Abort(status);
      return status;
    }
    auto& cuda = static_cast<CudaStream&>(stream);
    for (const auto& added : entry.added) {
      if (added != nullptr) cuda.Check(added->HoldUp(cuda.get()), "waiting");
    }
    return status;
  }

  void Abort(const absl::Status& status) override {
    shards_->Abort(status);
    replicas_->Abort(status);
  }

  Statistics statistics() const override {
    Statistics all = shards_->statistics();
    const Statistics more = replicas_->statistics();
    all.bytes_sent += more.bytes_sent;
    all.collectives += more.collectives;
    all.busy_seconds += more.busy_seconds;
    all.wait_seconds += more.wait_seconds;
    return all;
  }

 private:
  // What one ticket stands for: a collective in each group, 0 for none, and how
  // far the lanes have to be.
  struct Entry {
    Ticket shards = 0;
    Ticket replicas = 0;
    std::array<std::shared_ptr<CudaEvent>, 2> added = {};
  };
  // Sums over ranks, over groups, and additions, one after the other. Of two,
  // so that the groups are busy at the same time.
  struct Lane {
    CudaStream stream;
    CudaEvent ready;
    std::unique_ptr<DeviceBuffer> sum;
  };

  Ticket Add(Entry entry) {
    entries_.push_back(std::move(entry));
    if (entries_.size() > kMaxEntries) {
      Entry& oldest = entries_.front();
      older_.shards = std::max(older_.shards, oldest.shards);
      older_.replicas = std::max(older_.replicas, oldest.replicas);
      for (size_t i = 0; i < 2; ++i) {
        if (oldest.added[i] != nullptr) {
          older_.added[i] = std::move(oldest.added[i]);
        }
      }
      entries_.pop_front();
    }
    return ++last_;
  }

  // It comes after what is in `from`.
  Lane& NextLane(CudaStream& from) {
    Lane& lane = lanes_[turn_];
    turn_ = 1 - turn_;
    Check(lane.ready.Record(from.get()));
    Check(lane.ready.HoldUp(lane.stream.get()));
    return lane;
  }

  // sum = the sum over the ranks of all groups.
  void SumInto(Lane& lane, const Tensor& full, int64_t stride,
               const Tensor& sum, Entry& entry) {
    entry.shards = shards_->ReduceScatterParts(lane.stream, full, stride, sum,
                                               /*accumulate=*/false);
    const absl::Status within = shards_->Wait(lane.stream, entry.shards);
    // The other groups are not to add what is none.
    if (!within.ok()) replicas_->Abort(within);
    entry.replicas = replicas_->AllReduce(lane.stream, sum);
    const absl::Status across = replicas_->Wait(lane.stream, entry.replicas);
    if (!across.ok()) shards_->Abort(across);
    // Whoever waits for the entry asks the groups.
    lane.stream.ForgetQuestions();
  }

  void Mark(Lane& lane, Entry& entry) {
    const size_t which = &lane == &lanes_[0] ? 0 : 1;
    auto& added = entry.added[which];
    if (added == nullptr) added = FreeEvent();
    Check(added->Record(lane.stream.get()));
  }

  std::shared_ptr<CudaEvent> FreeEvent() {
    for (const auto& event : events_) {
      if (event.use_count() == 1) return event;
    }
    return events_.emplace_back(std::make_shared<CudaEvent>());
  }

  void Check(cudaError_t error) {
    if (error == cudaSuccess) return;
    Abort(CudaStatus(error, "summing over replicas"));
  }

  CudaDevice& device_;
  const int64_t piece_;  // elements
  std::unique_ptr<Collectives> shards_, replicas_;
  std::array<Lane, 2> lanes_;
  size_t turn_ = 0;
  std::vector<std::shared_ptr<CudaEvent>> events_;

  Ticket last_ = 0;
  std::deque<Entry> entries_;  // of the last tickets
  Entry older_;                // all before these
};

}  // namespace

absl::StatusOr<std::unique_ptr<Collectives>> NewReplicatedNcclCollectives(
    CudaDevice& device, std::unique_ptr<Collectives> shards,
    std::unique_ptr<Collectives> replicas, int64_t sum_bytes) {
  GW_CHECK(sum_bytes > 0 && sum_bytes % 4 == 0);
  device.MakeCurrent();  // for its streams
  auto made = std::make_unique<ReplicatedNccl>(device, std::move(shards),
                                               std::move(replicas), sum_bytes);
  GW_RETURN_IF_ERROR(made->AllocateSums());
  return made;
}

}  // namespace gradwire
