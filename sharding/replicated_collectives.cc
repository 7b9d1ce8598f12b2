// SPDX-License-Identifier: Apache-2.0
#include "sharding/replicated_collectives.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "base/status.h"
#include "sharding/collective_error.h"
#include "sharding/queued_collectives.h"

namespace gradwire {
namespace {

// Nothing is ever on its way in it.
class IdleStream : public Stream {
 protected:
  void Synchronize() override {}
};

class ReplicatedBackend : public BlockingCollectives {
 public:
  ReplicatedBackend(std::unique_ptr<Collectives> shards,
                    std::unique_ptr<Collectives> replicas)
      : shards_(std::move(shards)), replicas_(std::move(replicas)) {}

  int rank() const override { return shards_->rank(); }
  int world() const override { return shards_->world(); }

  absl::Status AllGather(const Tensor& shard, const Tensor& full) override {
    return Run(*shards_, shards_->AllGather(stream_, shard, full));
  }
  absl::Status AllReduce(const Tensor& values) override {
    return Run(*shards_, shards_->AllReduce(stream_, values));
  }
  absl::Status Broadcast(const Tensor& values, int root) override {
    return Run(*shards_, shards_->Broadcast(stream_, values, root));
  }

  absl::Status ReduceScatterParts(const Tensor& full, int64_t stride,
                                  const Tensor& shard,
                                  bool accumulate) override {
    Tensor sum = shard;
    if (accumulate) {
      sum_.resize(static_cast<size_t>(shard.num_elements()));
      sum = Tensor(sum_.data(), DType::kF32, {shard.num_elements()});
    }
    GW_RETURN_IF_ERROR(Run(*shards_, shards_->ReduceScatterParts(
                                         stream_, full, stride, sum, false)));
    GW_RETURN_IF_ERROR(Run(*replicas_, replicas_->AllReduce(stream_, sum)));
    if (!accumulate) return absl::OkStatus();
    float* const to = shard.data<float>();
    for (size_t i = 0; i < sum_.size(); ++i) to[i] += sum_[i];
    return absl::OkStatus();
  }

  void Interrupt() override { End(); }
  void End() override {
    const absl::Status status = RankStopped(rank());
    shards_->Abort(status);
    replicas_->Abort(status);
  }

  int64_t bytes_sent() const override {
    return shards_->statistics().bytes_sent +
           replicas_->statistics().bytes_sent;
  }

 private:
  absl::Status Run(Collectives& group, Collectives::Ticket ticket) {
    return group.Wait(stream_, ticket);
  }

  const std::unique_ptr<Collectives> shards_, replicas_;
  IdleStream stream_;
  std::vector<float> sum_;
};

}  // namespace

std::unique_ptr<Collectives> NewReplicatedCollectives(
    std::unique_ptr<Collectives> shards,
    std::unique_ptr<Collectives> replicas) {
  return NewQueuedCollectives(std::make_unique<ReplicatedBackend>(
      std::move(shards), std::move(replicas)));
}

}  // namespace gradwire
