// SPDX-License-Identifier: Apache-2.0
#include "sharding/local/local_collectives.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/status.h"
#include "sharding/collective_error.h"
#include "sharding/local/meeting.h"
#include "sharding/queued_collectives.h"
#include "sharding/rank_sum.h"

namespace gradwire {
namespace {

void Copy(const void* from, int64_t bytes, void* to) {
  if (from != to && bytes > 0) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

class LocalCollectives : public BlockingCollectives {
 public:
  LocalCollectives(std::shared_ptr<Meeting> meeting, int rank)
      : meeting_(std::move(meeting)), rank_(rank) {}
  ~LocalCollectives() override { meeting_->Leave(rank_); }

  int rank() const override { return rank_; }
  int world() const override { return meeting_->world(); }

  absl::Status AllGather(const Tensor& shard, const Tensor& full) override {
    CountSent(shard.bytes());
    return meeting_->Meet(rank_, shard.raw(), [&](const auto& shards) {
      for (int rank = 0; rank < world(); ++rank) {
        Copy(shards[static_cast<size_t>(rank)], shard.bytes(),
             static_cast<char*>(full.raw()) + rank * shard.bytes());
      }
    });
  }

  absl::Status ReduceScatterParts(const Tensor& full, int64_t stride,
                                  const Tensor& shard,
                                  bool accumulate) override {
    const int64_t n = shard.num_elements();
    CountSent(shard.bytes());
    return meeting_->Meet(rank_, full.raw(), [&](const auto& fulls) {
      std::vector<const float*> parts;
      for (const void* part : fulls) {
        parts.push_back(static_cast<const float*>(part) + rank_ * stride);
      }
      SumInRankOrder<float>(parts, n, shard.data<float>(), accumulate);
    });
  }

  absl::Status AllReduce(const Tensor& values) override {
    CountSent(values.bytes());
    return values.dtype() == DType::kF32 ? SumAll<float>(values)
                                         : SumAll<double>(values);
  }

  absl::Status Broadcast(const Tensor& values, int root) override {
    if (rank_ == root) CountSent(values.bytes());
    return meeting_->Meet(rank_, values.raw(), [&](const auto& all) {
      Copy(all[static_cast<size_t>(root)], values.bytes(), values.raw());
    });
  }

  void Interrupt() override {
    meeting_->End(CollectiveFailed(rank_, "it ended the group"));
  }
  // Those who meet have seen the failure, or the interruption.
  void End() override {}

  int64_t bytes_sent() const override { return bytes_sent_; }

 private:
  template <typename T>
  absl::Status SumAll(const Tensor& values) {
    const int64_t n = values.num_elements();
    // The others read `values` until all are done.
    std::vector<T> sum(static_cast<size_t>(n));
    GW_RETURN_IF_ERROR(
        meeting_->Meet(rank_, values.raw(), [&](const auto& all) {
          std::vector<const T*> parts;
          for (const void* part : all) {
            parts.push_back(static_cast<const T*>(part));
          }
          SumInRankOrder<T>(parts, n, sum.data(), /*accumulate=*/false);
        }));
    std::copy(sum.begin(), sum.end(), values.data<T>());
    return absl::OkStatus();
  }

  void CountSent(int64_t bytes) { bytes_sent_ += bytes * (world() - 1); }

  const std::shared_ptr<Meeting> meeting_;
  const int rank_;
  std::atomic<int64_t> bytes_sent_{0};
};

}  // namespace

std::vector<std::unique_ptr<Collectives>> NewLocalCollectives(
    int world, absl::Duration timeout) {
  const auto meeting = std::make_shared<Meeting>(world, timeout);
  std::vector<std::unique_ptr<Collectives>> ranks;
  for (int rank = 0; rank < world; ++rank) {
    ranks.push_back(NewQueuedCollectives(
        std::make_unique<LocalCollectives>(meeting, rank)));
  }
  return ranks;
}

}  // namespace gradwire
