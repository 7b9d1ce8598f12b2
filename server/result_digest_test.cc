// SPDX-License-Identifier: Apache-2.0
#include "server/result_digest.h"

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace gradwire {
namespace {

std::string Name(int i) { return "metric" + std::to_string(i) + ":sum"; }

v1::RankDone Forward() {
  v1::RankDone done;
  done.set_command_id(7);
  done.set_weight_version(2);
  done.set_optimizer_step(3);
  v1::ForwardResult& forward = *done.mutable_forward();
  forward.set_datum_count(2);
  for (int i = 0; i < 40; ++i) (*forward.mutable_metrics())[Name(i)] = i;
  return done;
}

std::vector<v1::LogprobItem> Logprobs() {
  std::vector<v1::LogprobItem> items(2);
  for (int i = 0; i < 2; ++i) {
    v1::LogprobItem& item = items[static_cast<size_t>(i)];
    item.set_datum_index(i);
    for (v1::TensorData* tensor :
         {item.mutable_logprobs(), item.mutable_top_k_logprobs(),
          item.mutable_top_k_indices()}) {
      tensor->set_data(std::string(8, static_cast<char>('a' + i)));
      tensor->add_shape(2);
    }
  }
  return items;
}

TEST(ResultDigestTest, LeavesOutWhatARepetitionMayChange) {
  const std::string digest = ResultDigest(Forward(), Logprobs());
  EXPECT_EQ(digest.size(), 16u);
  const std::vector<std::function<void(v1::RankDone&)>> changes = {
      [](auto& d) { d.set_command_id(8); },
      [](auto& d) { d.mutable_memory_use()->set_total(9); },
      [](auto& d) { d.mutable_collective_use()->set_wait_seconds(9); },
      [](auto& d) { d.mutable_forward()->set_retained(true); },
      [](auto& d) { d.mutable_forward()->set_retained_layers(9); },
      [](auto& d) { d.mutable_forward()->set_activation_id("a"); },
      [](auto& d) { d.mutable_forward()->mutable_expires()->set_nanos(9); },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    v1::RankDone done = Forward();
    changes[i](done);
    EXPECT_EQ(ResultDigest(done, Logprobs()), digest) << i;
  }
  v1::RankDone backward, again;
  (*backward.mutable_backward()->mutable_metrics())["loss:sum"] = 1;
  again = backward;
  again.mutable_backward()->set_recomputed(true);
  EXPECT_EQ(ResultDigest(backward, {}), ResultDigest(again, {}));
}

TEST(ResultDigestTest, AnyOtherChangeIsAnotherDigest) {
  std::set<std::string> digests = {ResultDigest(Forward(), Logprobs())};
  const std::vector<std::function<void(v1::RankDone&)>> changes = {
      [](auto& d) { d.set_weight_version(9); },
      [](auto& d) { d.set_optimizer_step(9); },
      [](auto& d) { d.set_dropped_ops(9); },
      [](auto& d) { d.set_state_digest("x"); },
      [](auto& d) { d.mutable_error()->set_reason("X"); },
      [](auto& d) { d.mutable_forward()->set_datum_count(9); },
      [](auto& d) { (*d.mutable_forward()->mutable_metrics())[Name(0)] = 1; },
      [](auto& d) { (*d.mutable_forward()->mutable_metrics())["a:sum"] = 0; },
      [](auto& d) { d.mutable_backward(); },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    v1::RankDone done = Forward();
    changes[i](done);
    EXPECT_TRUE(digests.insert(ResultDigest(done, Logprobs())).second) << i;
  }
  using Items = std::vector<v1::LogprobItem>;
  const auto flip = [](v1::TensorData& tensor) {
    (*tensor.mutable_data())[7] ^= 1;
  };
  const std::vector<std::function<void(Items&)>> item_changes = {
      [&](Items& items) { flip(*items[0].mutable_logprobs()); },
      [&](Items& items) { flip(*items[1].mutable_logprobs()); },
      [&](Items& items) { flip(*items[1].mutable_top_k_logprobs()); },
      [&](Items& items) { flip(*items[1].mutable_top_k_indices()); },
      [](Items& items) { items[0].mutable_logprobs()->set_shape(0, 1); },
      [](Items& items) { std::swap(items[0], items[1]); },
      [](Items& items) { items.pop_back(); },
      [](Items& items) { items.emplace_back(); },
  };
  for (size_t i = 0; i < item_changes.size(); ++i) {
    Items items = Logprobs();
    item_changes[i](items);
    EXPECT_TRUE(digests.insert(ResultDigest(Forward(), items)).second) << i;
  }
}

// A map of so many entries has another order whenever it grows differently.
TEST(ResultDigestTest, DoesNotDependOnTheOrderOfAMap) {
  v1::RankDone other = Forward();
  auto& metrics = *other.mutable_forward()->mutable_metrics();
  metrics.clear();
  for (int i = 0; i < 2000; ++i) metrics["other" + std::to_string(i)] = i;
  for (int i = 39; i >= 0; --i) metrics[Name(i)] = i;
  for (int i = 0; i < 2000; ++i) metrics.erase("other" + std::to_string(i));
  EXPECT_EQ(ResultDigest(other, Logprobs()),
            ResultDigest(Forward(), Logprobs()));
}

}  // namespace
}  // namespace gradwire
