// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/encode.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace gradwire {
namespace {

// One group of one tensor.
struct Item {
  size_t tensor = 0;
  int64_t first = 0;  // element
  int64_t count = 0;
};

// Cuts `count` elements that begin at `first` into groups.
void AppendGroups(size_t tensor, int64_t first, int64_t count,
                  std::vector<Item>& items) {
  constexpr int64_t kMost = kGroupChunks * kChunkElements;
  for (int64_t done = 0; done < count; done += kMost) {
    items.push_back({tensor, first + done, std::min(kMost, count - done)});
  }
}

GroupShape ShapeOf(const std::string& dtype, int64_t num_elements) {
  GroupShape shape;
  shape.num_elements = num_elements;
  shape.element_bytes = DeltaElementBytes(dtype);
  shape.floats16 = IsFloat16(dtype);
  GW_CHECK(shape.element_bytes > 0);
  return shape;
}

const uint8_t* At(const void* data, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<const uint8_t*>(data) + bytes;
}

absl::Status CheckShards(const TensorInfo& info,
                         const std::vector<int64_t>& begins) {
  int64_t before = 0;
  for (const int64_t begin : begins) {
    if (begin <= before || begin % kChunkElements != 0 ||
        begin >= info.num_elements()) {
      return DeltaInvalid(
          "shard_begins", std::to_string(begin), std::to_string(kChunkElements),
          "are not ascending multiples of a chunk within " + info.name);
    }
    before = begin;
  }
  return absl::OkStatus();
}

// body(item, thread), on one thread or the pool's.
void ForEach(int64_t n, ThreadPool* pool,
             const std::function<void(int64_t, int)>& body) {
  if (pool != nullptr) {
    pool->ParallelItems(n, body);
  } else {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
  }
}

}  // namespace

std::vector<EncodedGroup> EncodeShard(const std::string& dtype,
                                      const void* before, const void* after,
                                      int64_t num_elements, bool fast) {
  GroupEncoder encoder;
  std::vector<Item> items;
  AppendGroups(0, 0, num_elements, items);
  std::vector<EncodedGroup> groups;
  for (const Item& item : items) {
    const GroupShape shape = ShapeOf(dtype, item.count);
    const int64_t offset = item.first * shape.element_bytes;
    groups.push_back(encoder.Encode(shape, At(before, offset),
                                    At(after, offset),
                                    {fast, before == nullptr, {}}));
  }
  return groups;
}

absl::StatusOr<std::string> EncodeDelta(absl::Span<const TensorView> before,
                                        absl::Span<const TensorView> after,
                                        const DeltaOptions& options) {
  std::map<std::string, const TensorView*> old_tensors;
  for (const TensorView& tensor : before) {
    old_tensors[tensor.info.name] = &tensor;
  }
  std::vector<EncodedTensor> tensors;
  std::vector<const void*> old_data;
  std::vector<Item> items;
  for (const TensorView& tensor : after) {
    const TensorInfo& info = tensor.info;
    if (DeltaElementBytes(info.dtype) == 0) {
      return DeltaInvalid(info.name, info.dtype, "", "has an unknown dtype");
    }
    const auto found = old_tensors.find(info.name);
    const bool fresh =
        found == old_tensors.end() || found->second->info != info;
    old_data.push_back(fresh ? nullptr : found->second->data);
    std::vector<int64_t> cuts = {0};
    if (auto shards = options.shard_begins.find(info.name);
        shards != options.shard_begins.end()) {
      GW_RETURN_IF_ERROR(CheckShards(info, shards->second));
      cuts.insert(cuts.end(), shards->second.begin(), shards->second.end());
    }
    cuts.push_back(info.num_elements());
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      AppendGroups(tensors.size(), cuts[i], cuts[i + 1] - cuts[i], items);
    }
    tensors.push_back({info, fresh, {}, {}});
  }
  std::vector<EncodedGroup> groups(items.size());
  std::vector<GroupEncoder> encoders(static_cast<size_t>(
      options.pool == nullptr ? 1 : options.pool->num_threads()));
  ForEach(static_cast<int64_t>(items.size()), options.pool,
          [&](int64_t i, int thread) {
            const Item& item = items[static_cast<size_t>(i)];
            const EncodedTensor& tensor = tensors[item.tensor];
            const GroupShape shape = ShapeOf(tensor.info.dtype, item.count);
            const int64_t offset = item.first * shape.element_bytes;
            groups[static_cast<size_t>(i)] =
                encoders[static_cast<size_t>(thread)].Encode(
                    shape, At(old_data[item.tensor], offset),
                    At(after[item.tensor].data, offset),
                    {options.fast, tensor.fresh, {}});
          });
  for (size_t i = 0; i < items.size(); ++i) {
    tensors[items[i].tensor].groups.push_back(std::move(groups[i]));
  }
  return AssembleDelta(std::move(tensors), options);
}

std::string ComputeWeightId(absl::Span<const TensorView> weights,
                            ThreadPool* pool) {
  std::vector<Item> items;
  std::vector<TensorInfo> infos;
  for (size_t i = 0; i < weights.size(); ++i) {
    AppendGroups(i, 0, weights[i].info.num_elements(), items);
    infos.push_back(weights[i].info);
  }
  std::vector<std::vector<Hash128>> parts(items.size());
  ForEach(static_cast<int64_t>(items.size()), pool, [&](int64_t i, int) {
    const Item& item = items[static_cast<size_t>(i)];
    const TensorView& tensor = weights[item.tensor];
    const int64_t element = DeltaElementBytes(tensor.info.dtype);
    HashChunks(At(tensor.data, item.first * element), item.count, element,
               parts[static_cast<size_t>(i)]);
  });
  std::vector<std::vector<Hash128>> chunks(weights.size());
  for (size_t i = 0; i < items.size(); ++i) {
    std::vector<Hash128>& all = chunks[items[i].tensor];
    all.insert(all.end(), parts[i].begin(), parts[i].end());
  }
  std::vector<Hash128> hashes;
  for (const std::vector<Hash128>& all : chunks) {
    hashes.push_back(HashOfChunks(all));
  }
  return WeightId(infos, hashes);
}

}  // namespace gradwire
