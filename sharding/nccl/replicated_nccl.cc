// SPDX-License-Identifier: Apache-2.0
#include "sharding/nccl/replicated_nccl.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/status.h"
#include "device/cuda/cuda_event.h"
#include "device/cuda/cuda_status.h"
#include "sharding/collective_error.h"
#include "sharding/nccl/rank_sum_cuda.h"

namespace gradwire {
namespace {

// A ticket of before is waited for with the oldest of these.
constexpr size_t kMaxEntries = 64;

// Sums over ranks, then over groups, then additions, one after the other. There
// are two, so that both groups are busy.
struct Lane {
  CudaStream stream;
  CudaEvent ready;
  std::unique_ptr<DeviceBuffer> sum;
};

// What streams that still ask may outlive the collectives with.
class Lanes {
 public:
  Lane& operator[](size_t i) { return lanes_[i]; }

  // No lock: whoever ends a group says so while another thread waits here.
  void SetFailed() { failed_ = true; }
  // After a failure, when both groups have ended or are about to: what is added
  // is, too.
  absl::Status LeaveMemoryAlone() {
    if (!failed_) return absl::OkStatus();
    for (Lane& lane : lanes_) {
      GW_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(lane.stream.get()),
                                    "summing over replicas"));
    }
    return absl::OkStatus();
  }

 private:
  std::atomic<bool> failed_{false};
  std::array<Lane, 2> lanes_;
};

// The two groups, for whoever must end them. Thread rule: from any thread.
class Groups {
 public:
  Groups(std::unique_ptr<NcclGroup> shards, std::unique_ptr<NcclGroup> replicas)
      : shards(std::move(shards)), replicas(std::move(replicas)) {
    for (NcclGroup* group : {this->shards.get(), this->replicas.get()}) {
      targets_.push_back(group);
    }
  }
  // One after the other: each still tells of its failure while it ends.
  ~Groups() {
    Forget(shards.get());
    shards.reset();
    Forget(replicas.get());
    replicas.reset();
  }

  void Abort(const absl::Status& status) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (NcclGroup* group : targets_) group->Abort(status);
  }

  std::unique_ptr<NcclGroup> shards, replicas;

 private:
  void Forget(NcclGroup* group) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::erase(targets_, group);
  }

  std::mutex mutex_;
  std::vector<NcclGroup*> targets_;  // guarded by mutex_
};

class ReplicatedNccl : public Collectives {
 public:
  ReplicatedNccl(CudaDevice& device, std::unique_ptr<NcclGroup> shards,
                 std::unique_ptr<NcclGroup> replicas, int64_t sum_bytes)
      : device_(device),
        piece_(sum_bytes / 4),
        lanes_(std::make_shared<Lanes>()),
        groups_(
            std::make_unique<Groups>(std::move(shards), std::move(replicas))) {
    for (NcclGroup* group : {groups_->shards.get(), groups_->replicas.get()}) {
      group->WhenFailed([lanes = lanes_.get(),
                         groups = groups_.get()](const absl::Status& status) {
        lanes->SetFailed();
        groups->Abort(status);
      });
    }
  }

  ~ReplicatedNccl() override {
    device_.MakeCurrent();
    // What one group still does, the other may wait for.
    if (latest_.added != nullptr &&
        latest_.added->Query() == cudaErrorNotReady) {
      Abort(CollectiveFailed(groups_->shards->name(), "it left the group"));
    }
    groups_.reset();
    lanes_->LeaveMemoryAlone().IgnoreError();
  }

  absl::Status Start() {
    for (size_t i : {0, 1}) {
      Lane& lane = (*lanes_)[i];
      GW_RETURN_IF_ERROR(lane.stream.Finish());
      GW_ASSIGN_OR_RETURN(lane.sum, device_.Allocate(piece_ * 4));
    }
    return absl::OkStatus();
  }

  int rank() const override { return groups_->shards->rank(); }
  int world() const override { return groups_->shards->world(); }

  Ticket AllGather(Stream& stream, const Tensor& shard,
                   const Tensor& full) override {
    return AddOfShards(groups_->shards->AllGather(stream, shard, full));
  }
  Ticket AllReduce(Stream& stream, const Tensor& values) override {
    return AddOfShards(groups_->shards->AllReduce(stream, values));
  }
  Ticket Broadcast(Stream& stream, const Tensor& values, int root) override {
    return AddOfShards(groups_->shards->Broadcast(stream, values, root));
  }

  Ticket ReduceScatterParts(Stream& stream, const Tensor& full, int64_t stride,
                            const Tensor& shard, bool accumulate) override {
    device_.MakeCurrent();
    const int64_t n = shard.num_elements();
    GW_CHECK(stride >= n && full.num_elements() == (world() - 1) * stride + n);
    for (int64_t at = 0; at < n; at += piece_) {
      const int64_t part = std::min(piece_, n - at);
      SumPiece(static_cast<CudaStream&>(stream),
               full.Rows(at, at + (world() - 1) * stride + part), stride,
               shard.Rows(at, at + part), accumulate);
    }
    Entry entry = latest_;
    entry.is_sum = true;
    return Add(entry);
  }

  absl::Status Wait(Stream& stream, Ticket ticket) override {
    GW_CHECK(0 < ticket && ticket <= last_);
    device_.MakeCurrent();
    const Ticket before = last_ - static_cast<Ticket>(entries_.size());
    const Entry& entry =
        entries_[static_cast<size_t>(std::max<Ticket>(ticket - before - 1, 0))];
    const auto wait = [&](NcclGroup& group, Ticket of, bool counted) {
      if (of == 0) return absl::OkStatus();
      return counted ? group.Wait(stream, of) : group.Follow(stream, of);
    };
    // The sum over groups comes after that within: until its end is waited for.
    // It comes first, before the stream stands still for the other.
    absl::Status status = ticket < failed_from_ ? absl::OkStatus() : failure_;
    if (status.ok()) {
      status = wait(*groups_->replicas, entry.replicas, entry.is_sum);
    }
    if (status.ok()) {
      status = wait(*groups_->shards, entry.shards, !entry.is_sum);
    }
    if (!status.ok()) {
      Abort(status);
      // Both say so when they have ended.
      wait(*groups_->shards, latest_.shards, false).IgnoreError();
      wait(*groups_->replicas, latest_.replicas, false).IgnoreError();
      lanes_->SetFailed();
      lanes_->LeaveMemoryAlone().IgnoreError();
      return status;
    }
    auto& cuda = static_cast<CudaStream&>(stream);
    if (entry.added != nullptr) {
      cuda.Check(entry.added->HoldUp(cuda.get()), "waiting");
      // After the groups', each of which waits for its group's end.
      cuda.AskWhenSynchronized(
          [lanes = lanes_] { return lanes->LeaveMemoryAlone(); });
    }
    return absl::OkStatus();
  }

  void Abort(const absl::Status& status) override { groups_->Abort(status); }

  // A sum counts as one collective, once it is queued; times are those of both
  // groups together.
  Statistics statistics() const override {
    Statistics all = groups_->shards->statistics();
    const Statistics more = groups_->replicas->statistics();
    all.bytes_sent += more.bytes_sent;
    all.collectives = last_;
    all.busy_seconds += more.busy_seconds;
    all.wait_seconds += more.wait_seconds;
    return all;
  }

 private:
  // How far the groups and the lanes have to be when a ticket, and so all
  // before it, is done.
  struct Entry {
    Ticket shards = 0;
    Ticket replicas = 0;
    std::shared_ptr<CudaEvent> added;
    bool is_sum = false;
  };

  Ticket AddOfShards(Ticket ticket) {
    latest_.shards = ticket;
    return Add(latest_);
  }
  Ticket Add(const Entry& entry) {
    entries_.push_back(entry);
    if (entries_.size() > kMaxEntries) entries_.pop_front();
    return ++last_;
  }

  // shard = or += the sum over the ranks of all groups.
  void SumPiece(CudaStream& from, const Tensor& full, int64_t stride,
                const Tensor& shard, bool accumulate) {
    Lane& lane = (*lanes_)[turn_];
    turn_ = 1 - turn_;
    Check(lane.ready.Record(from.get()));
    Check(lane.ready.HoldUp(lane.stream.get()));
    const int64_t n = shard.num_elements();
    const Tensor sum(lane.sum->data(), DType::kF32, {n});
    latest_.shards = groups_->shards->ReduceScatterParts(
        lane.stream, full, stride, sum, /*accumulate=*/false);
    Follow(*groups_->shards, latest_.shards, lane);
    latest_.replicas = groups_->replicas->AllReduce(lane.stream, sum);
    Follow(*groups_->replicas, latest_.replicas, lane);
    // Additions are in order, whichever lane makes them: they may be to the
    // same shard.
    if (latest_.added != nullptr) {
      Check(latest_.added->HoldUp(lane.stream.get()));
    }
    const RankParts<float> parts = {.own = sum.data<float>(),
                                    .others = nullptr,
                                    .stride = 0,
                                    .rank = 0,
                                    .world = 1};
    Check(SumInRankOrder<float>(parts, n, shard.data<float>(), accumulate,
                                lane.stream.get()));
    latest_.added = FreeEvent();
    Check(latest_.added->Record(lane.stream.get()));
    // A failure is whoever's who waits for the ticket; but one of CUDA's.
    lane.stream.ForgetQuestions();
    if (!lane.stream.ok()) Check(cudaErrorUnknown);
  }

  void Follow(NcclGroup& group, Ticket ticket, Lane& lane) {
    // The others are not to add what is none. What is not known yet this rank
    // itself will tell of.
    const absl::Status status = group.Follow(lane.stream, ticket);
    if (!status.ok()) Abort(status);
  }

  std::shared_ptr<CudaEvent> FreeEvent() {
    for (const auto& event : events_) {
      if (event.use_count() == 1) return event;
    }
    return events_.emplace_back(std::make_shared<CudaEvent>());
  }

  // The groups may have done their part by then: the ticket that is being made
  // and all after it fail for this.
  void Check(cudaError_t error) {
    if (error == cudaSuccess) return;
    if (failure_.ok()) {
      failure_ = CudaStatus(error, "summing over replicas");
      failed_from_ = last_ + 1;
    }
    Abort(failure_);
  }

  CudaDevice& device_;
  const int64_t piece_;  // elements
  const std::shared_ptr<Lanes> lanes_;
  size_t turn_ = 0;
  std::vector<std::shared_ptr<CudaEvent>> events_;
  std::unique_ptr<Groups> groups_;

  Ticket last_ = 0;
  absl::Status failure_;  // of CUDA, here
  Ticket failed_from_ = 0;
  Entry latest_;
  std::deque<Entry> entries_;  // of the last tickets
};

}  // namespace

absl::StatusOr<std::unique_ptr<Collectives>> NewReplicatedNcclCollectives(
    CudaDevice& device, std::unique_ptr<NcclGroup> shards,
    std::unique_ptr<NcclGroup> replicas, int64_t sum_bytes) {
  GW_CHECK(sum_bytes > 0 && sum_bytes % 4 == 0);
  device.MakeCurrent();  // for its streams
  auto made = std::make_unique<ReplicatedNccl>(device, std::move(shards),
                                               std::move(replicas), sum_bytes);
  GW_RETURN_IF_ERROR(made->Start());
  return made;
}

}  // namespace gradwire
