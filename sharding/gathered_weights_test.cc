// SPDX-License-Identifier: Apache-2.0
#include "sharding/gathered_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "device/cpu_device.h"
#include "sharding/local/local_collectives.h"

namespace gradwire {
namespace {

// An embedding, blocks, and a head, each of any size.
ShardLayout RandomModel(int blocks, int world, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int64_t> begins = {0};
  int64_t end = ShardLayout::kMinAlignment * (1 + random() % 50);
  for (int i = 0; i <= blocks; ++i) {
    begins.push_back(end);
    end += ShardLayout::kMinAlignment * (1 + random() % 30);
  }
  return ShardLayout(begins, end, world);
}

// Elements of the largest block.
int64_t LargestBlock(const ShardLayout& layout) {
  int64_t largest = 0;
  for (int unit = 1; unit + 1 < layout.num_units(); ++unit) {
    largest = std::max(largest, layout.PaddedSize(unit));
  }
  return largest;
}

// However many blocks a model has, two of them are there at a time.
TEST(GatheredWeightsTest, TakesTheMemoryOfTwoBlocks) {
  for (const int blocks : {1, 2, 3, 8, 80}) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const ShardLayout layout = RandomModel(blocks, 1 + seed % 5, seed);
      const UnitPlaces places = PlacesInTurns(layout);
      EXPECT_LE(places.total(), 2 * LargestBlock(layout) +
                                    layout.PaddedSize(0) +
                                    layout.PaddedSize(layout.num_units() - 1));
      CpuDevice device(1);
      std::vector<float> shard(static_cast<size_t>(layout.shard_elements()));
      const auto alone = NewLocalCollectives(layout.world(), absl::Seconds(60));
      const auto weights = GatheredWeights::Create(
          layout, places,
          Tensor(shard.data(), DType::kF32, {layout.shard_elements()}),
          *alone[0], device);
      ASSERT_TRUE(weights.ok());
      EXPECT_EQ((*weights)->bytes(), places.total() * 4);
      for (int unit = 0; unit < layout.num_units(); ++unit) {
        const auto place =
            static_cast<size_t>(places.of_unit[static_cast<size_t>(unit)]);
        EXPECT_GE(places.elements[place], layout.PaddedSize(unit));
        // The next one is gathered while this one is in use.
        if (unit > 1) {
          EXPECT_NE(places.of_unit[static_cast<size_t>(unit)],
                    places.of_unit[static_cast<size_t>(unit - 1)]);
        }
      }
    }
  }
}

// Element i of the model's weights in a version.
float ValueOf(int64_t i, int version) {
  return static_cast<float>((i * 7 + version * 1'000'003) % 16'777'213);
}

// Up and down through the units, as a forward and a backward go, with the next
// one on its way; then with other weights.
TEST(GatheredWeightsTest, GivesTheWeightsOfTheVersion) {
  for (const int world : {1, 2, 3, 4}) {
    for (const bool in_turns : {true, false}) {
      const ShardLayout layout = RandomModel(5, world, 17);
      auto groups = NewLocalCollectives(world, absl::Seconds(60));
      std::vector<std::thread> threads;
      for (int rank = 0; rank < world; ++rank) {
        threads.emplace_back([&, rank] {
          CpuDevice device(1);
          const auto stream = device.NewStream();
          std::vector<float> shard(
              static_cast<size_t>(layout.shard_elements()));
          const auto weights = GatheredWeights::Create(
              layout, in_turns ? PlacesInTurns(layout) : PlacesForAll(layout),
              Tensor(shard.data(), DType::kF32, {layout.shard_elements()}),
              *groups[static_cast<size_t>(rank)], device);
          ASSERT_TRUE(weights.ok());
          std::vector<int> order;
          for (int unit = 0; unit < layout.num_units(); ++unit) {
            order.push_back(unit);
          }
          order.insert(order.end(), order.rbegin(), order.rend());
          for (int version = 0; version < 3; ++version) {
            for (int unit = 0; unit < layout.num_units(); ++unit) {
              const ShardUnit& u = layout.unit(unit);
              for (int64_t i = 0; i < u.shard; ++i) {
                const int64_t at = rank * u.shard + i;
                shard[static_cast<size_t>(u.offset + i)] =
                    at < u.size() ? ValueOf(u.begin + at, version) : 0;
              }
            }
            (*weights)->NewVersion();
            for (size_t i = 0; i < order.size(); ++i) {
              const Tensor values = (*weights)->Acquire(*stream, order[i]);
              const bool has_next =
                  i + 1 < order.size() && order[i + 1] != order[i];
              if (has_next) (*weights)->Prefetch(*stream, order[i + 1]);
              ASSERT_TRUE(stream->Finish().ok());
              const ShardUnit& u = layout.unit(order[i]);
              ASSERT_EQ(values.num_elements(), u.size());
              const float* data = values.data<float>();
              for (int64_t at = 0; at < u.size(); ++at) {
                ASSERT_EQ(data[at], ValueOf(u.begin + at, version))
                    << "unit " << order[i] << " of version " << version;
              }
              (*weights)->Release(order[i]);
            }
          }
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
  }
}

}  // namespace
}  // namespace gradwire
