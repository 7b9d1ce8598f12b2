// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/apply.h"

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/status.h"

namespace gradwire {
namespace {

// One group, and where it goes.
struct Item {
  const DeltaTensor* tensor = nullptr;
  const DeltaGroup* group = nullptr;
  GroupShape shape;
  absl::Span<const ChunkRow> rows;
  const uint8_t* stored = nullptr;
  uint8_t* weights = nullptr;
};

struct Plan {
  // Of each changed tensor; items point into them.
  std::vector<std::unique_ptr<std::vector<ChunkRow>>> rows;
  std::vector<Item> items;
};

absl::Status AddTensor(const DeltaTensor& tensor, void* data, Plan& plan) {
  GW_ASSIGN_OR_RETURN(std::vector<ChunkRow> rows, DeltaFile::ReadRows(tensor));
  plan.rows.push_back(std::make_unique<std::vector<ChunkRow>>(std::move(rows)));
  const absl::Span<const ChunkRow> all(*plan.rows.back());
  const auto* stored = reinterpret_cast<const uint8_t*>(tensor.payload.data());
  int64_t chunk = 0;
  for (const DeltaGroup& group : tensor.groups) {
    Item item;
    item.tensor = &tensor;
    item.group = &group;
    item.shape = tensor.group_shape(chunk, group.chunks);
    item.rows = all.subspan(static_cast<size_t>(chunk),
                            static_cast<size_t>(group.chunks));
    item.stored = stored;
    item.weights = static_cast<uint8_t*>(data) +
                   chunk * kChunkElements * item.shape.element_bytes;
    plan.items.push_back(item);
    stored += group.stored_bytes();
    chunk += group.chunks;
  }
  return absl::OkStatus();
}

absl::StatusOr<Plan> MakePlan(const DeltaFile& delta,
                              absl::Span<const MutableTensor> weights) {
  std::map<std::string, const MutableTensor*> by_name;
  for (const MutableTensor& tensor : weights) {
    by_name[tensor.info.name] = &tensor;
  }
  if (by_name.size() != weights.size() ||
      weights.size() != delta.tensors().size()) {
    return DeltaInvalid("tensors", std::to_string(weights.size()),
                        std::to_string(delta.tensors().size()),
                        "are others than those of the weights");
  }
  Plan plan;
  // All shapes before any table, whose size goes by the shape.
  for (const DeltaTensor& tensor : delta.tensors()) {
    const auto found = by_name.find(tensor.info.name);
    if (found == by_name.end() || found->second->info != tensor.info) {
      return DeltaInvalid(tensor.info.name, tensor.info.dtype, "",
                          "is not among the weights, or has another dtype or "
                          "shape there");
    }
  }
  for (const DeltaTensor& tensor : delta.tensors()) {
    if (!tensor.changed()) continue;
    GW_RETURN_IF_ERROR(
        AddTensor(tensor, by_name[tensor.info.name]->data, plan));
  }
  return plan;
}

}  // namespace

absl::Status ApplyDelta(const DeltaFile& delta,
                        absl::Span<const MutableTensor> weights,
                        std::string& weight_id, ThreadPool* pool) {
  if (delta.info().prev_id != weight_id) {
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "DELTA_PARENT_MISMATCH")
        .With("expected", delta.info().prev_id)
        .With("have", weight_id)
        .Message("the delta applies to weights " + delta.info().prev_id +
                 " but these are " + weight_id +
                 "; apply the deltas between them, or load full weights");
  }
  GW_ASSIGN_OR_RETURN(const Plan plan, MakePlan(delta, weights));
  const std::vector<Item>& items = plan.items;
  std::vector<ByteBuffer> saved(items.size());
  std::vector<std::optional<GroupResult>> results(items.size());
  std::vector<GroupDecoder> decoders(
      static_cast<size_t>(pool == nullptr ? 1 : pool->num_threads()));
  std::atomic<bool> failed{false};
  auto decode = [&](int64_t i, int thread) {
    if (failed) return;
    const auto at = static_cast<size_t>(i);
    const Item& item = items[at];
    GroupDecoder::Options options;
    if (!item.tensor->fresh) options.saved = &saved[at];
    results[at] = decoders[static_cast<size_t>(thread)].Decode(
        item.shape, item.rows, *item.group, item.stored, options, item.weights);
    if (results[at] != GroupResult::kOk) failed = true;
  };
  const auto num_items = static_cast<int64_t>(items.size());
  if (pool != nullptr) {
    pool->ParallelItems(num_items, decode);
  } else {
    for (int64_t i = 0; i < num_items; ++i) decode(i, 0);
  }
  if (!failed) {
    weight_id = delta.info().id;
    return absl::OkStatus();
  }
  bool corrupt = false;
  std::string field;
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    if (results[i] == GroupResult::kOk) {
      decoders[0].Undo(item.shape, item.rows, *item.group, item.stored,
                       saved[i].data(), item.weights);
    } else if (results[i].has_value() && field.empty()) {
      field = item.tensor->info.name;
      corrupt = results[i] == GroupResult::kCorrupt;
    }
  }
  if (corrupt) {
    return DeltaInvalid(field, "", "",
                        "has streams that are not what its "
                        "table says");
  }
  return DeltaCorrupt(field,
                      "does not come out with its checksum: the weights "
                      "are not those that the delta was made for");
}

}  // namespace gradwire
