// SPDX-License-Identifier: Apache-2.0
#include "sharding/reduced_gradients.h"

#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "device/cpu_device.h"
#include "sharding/local/local_collectives.h"
#include "sharding/replicated_collectives.h"

namespace gradwire {
namespace {

// The head's unit: a weight, and behind it what is made later.
constexpr int kHead = 2;
constexpr int64_t kWeight = 199'936, kLater = 192;

struct Group {
  const char* name;
  int world, replicas;
};

// `body(rank, collectives, gradients, shard)` on all ranks at once.
class PartsTest : public testing::TestWithParam<Group> {
 protected:
  int world() const { return GetParam().world; }
  int ranks() const { return world() * GetParam().replicas; }
  const ShardLayout& layout() const { return layout_; }

  std::vector<std::unique_ptr<Collectives>> Groups() const {
    const int replicas = GetParam().replicas;
    if (replicas == 1) {
      return NewLocalCollectives(world(), absl::Seconds(60));
    }
    std::vector<std::vector<std::unique_ptr<Collectives>>> across;
    for (int r = 0; r < world(); ++r) {
      across.push_back(NewLocalCollectives(replicas, absl::Seconds(60)));
    }
    std::vector<std::unique_ptr<Collectives>> groups;
    for (int g = 0; g < replicas; ++g) {
      auto within = NewLocalCollectives(world(), absl::Seconds(60));
      for (int r = 0; r < world(); ++r) {
        const auto rank = static_cast<size_t>(r);
        groups.push_back(NewReplicatedCollectives(
            std::move(within[rank]),
            std::move(across[rank][static_cast<size_t>(g)])));
      }
    }
    return groups;
  }

  void OnAll(const std::function<void(int, ReducedGradients&, Stream&,
                                      std::vector<float>&)>& body) {
    auto groups = Groups();
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks(); ++r) {
      threads.emplace_back([&, r] {
        CpuDevice device(1);
        const auto stream = device.NewStream();
        std::vector<float> shard(static_cast<size_t>(layout_.shard_elements()),
                                 -7.0f);
        auto gradients = ReducedGradients::Create(
            layout_, PlacesInTurns(layout_),
            Tensor(shard.data(), DType::kF32, {layout_.shard_elements()}),
            *groups[static_cast<size_t>(r)], device);
        ASSERT_TRUE(gradients.ok());
        body(r, **gradients, *stream, shard);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // Element i of the gradient that a rank makes in a round. Sums are exact.
  static float ValueOf(int rank, int round, int64_t i) {
    return static_cast<float>((i * 31 + rank * 17 + round * 5) % 1009);
  }
  // Element `i` of the unit, summed over ranks.
  float SumOf(int round, int64_t i) const {
    float sum = 0;
    for (int r = 0; r < ranks(); ++r) sum += ValueOf(r, round, i);
    return sum;
  }

  void ExpectSums(const std::vector<float>& shard, int rank, int rounds) const {
    const ShardUnit& u = layout_.unit(kHead);
    for (int64_t i = 0; i < u.shard; ++i) {
      const int64_t at = rank % world() * u.shard + i;
      float want = 0;
      for (int round = 0; round < rounds && at < u.size(); ++round) {
        want += SumOf(round, at);
      }
      ASSERT_EQ(shard[static_cast<size_t>(u.offset + i)], want) << i;
    }
  }

 private:
  const ShardLayout layout_{
      {0, 640, 1280}, 1280 + kWeight + kLater, GetParam().world};
};

// A rank that sends the weight while it is made, what is behind it when that is
// there; and one that has made all before. Twice, the second added.
TEST_P(PartsTest, SendsWhatIsMade) {
  OnAll([&](int rank, ReducedGradients& gradients, Stream& stream,
            std::vector<float>& shard) {
    for (int round = 0; round < 2; ++round) {
      gradients.Start(/*accumulate=*/round > 0);
      const Tensor values = gradients.Begin(stream, kHead).values;
      float* const to = values.data<float>();
      ASSERT_EQ(values.num_elements(), kWeight + kLater);
      // Sent too early, it would make sums that are no numbers.
      std::fill(to, to + values.num_elements(), NAN);
      int64_t asked = 0;
      const auto make = [&](int64_t begin, int64_t end) {
        ASSERT_LE(end, kWeight);
        for (int64_t i = begin; i < end; ++i) to[i] = ValueOf(rank, round, i);
        asked += end - begin;
      };
      if (rank % 2 == 0) {
        gradients.EndPart(stream, kHead, 0, kWeight, make);
        EXPECT_GT(asked, 0);
        EXPECT_LT(asked, kWeight);
      }
      for (int64_t i = 0; i < values.num_elements(); ++i) {
        // What is on its way is left alone.
        if (rank % 2 == 0 && to[i] == to[i]) continue;
        to[i] = ValueOf(rank, round, i);
      }
      gradients.EndPart(stream, kHead, 0, kWeight, nullptr);
      gradients.EndPart(stream, kHead, 0, kWeight + kLater, nullptr);
      // There is nothing to do.
      gradients.EndPart(stream, kHead, 0, kWeight + kLater, nullptr);
      gradients.Finish(stream);
      ASSERT_TRUE(stream.Finish().ok());
      ExpectSums(shard, rank, round + 1);
    }
  });
}

// A piece that is being sent keeps its memory until the place is begun again.
TEST_P(PartsTest, APlaceIsWaitedFor) {
  OnAll([&](int rank, ReducedGradients& gradients, Stream& stream,
            std::vector<float>& shard) {
    gradients.Start(/*accumulate=*/false);
    for (int round = 0; round < 3; ++round) {
      const Tensor values = gradients.Begin(stream, kHead).values;
      gradients.EndPart(stream, kHead, 0, kWeight + kLater,
                        [&](int64_t begin, int64_t end) {
                          for (int64_t i = begin; i < end; ++i) {
                            values.data<float>()[i] = ValueOf(rank, round, i);
                          }
                        });
      gradients.Start(/*accumulate=*/true);
    }
    const Tensor spare = gradients.Spare(stream, kHead);
    std::fill_n(spare.data<float>(), spare.num_elements(), NAN);
    gradients.Finish(stream);
    ASSERT_TRUE(stream.Finish().ok());
    ExpectSums(shard, rank, 3);
  });
}

INSTANTIATE_TEST_SUITE_P(All, PartsTest,
                         testing::Values(Group{"two", 2, 1},
                                         Group{"three", 3, 1},
                                         Group{"twoByTwo", 2, 2}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace gradwire
