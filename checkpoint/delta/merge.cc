// SPDX-License-Identifier: Apache-2.0
// Since differences are taken modulo 2^16, what several deltas make of a float
// does not depend on where it starts: they are applied to zeros, and the result
// is encoded against zeros. Raw chunks make their values absolute.
#include "checkpoint/delta/merge.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/status.h"
#include "checkpoint/delta/encode.h"

namespace gradwire {
namespace {

// One delta's word on a tensor.
struct Layer {
  const DeltaTensor* tensor = nullptr;
  std::vector<ChunkRow> rows;
};

absl::Status ShardsDiffer(const std::string& name) {
  return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                      "DELTA_SHARDS_DIFFER")
      .With("field", name)
      .Message("the deltas cut " + name +
               " into other shards; apply them one after another");
}

bool SameCuts(const DeltaTensor& a, const DeltaTensor& b) {
  return std::equal(a.groups.begin(), a.groups.end(), b.groups.begin(),
                    b.groups.end(),
                    [](const DeltaGroup& x, const DeltaGroup& y) {
                      return x.chunks == y.chunks;
                    });
}

const DeltaTensor* Find(const DeltaFile& delta, const std::string& name) {
  const auto& tensors = delta.tensors();
  const auto found =
      std::lower_bound(tensors.begin(), tensors.end(), name,
                       [](const DeltaTensor& t, const std::string& n) {
                         return t.info.name < n;
                       });
  return found == tensors.end() || found->info.name != name ? nullptr : &*found;
}

class Merger {
 public:
  // Group `index` of the layers, whose first chunk is `chunk`.
  absl::StatusOr<EncodedGroup> MergeGroup(const std::vector<Layer>& layers,
                                          size_t index, int64_t chunk) {
    const DeltaTensor& last = *layers.back().tensor;
    const int64_t chunks = last.groups[index].chunks;
    const GroupShape shape = last.group_shape(chunk, chunks);
    const size_t bytes =
        static_cast<size_t>(shape.num_elements * shape.element_bytes);
    zeros_.assign(bytes, 0);
    sum_.assign(bytes, 0);
    GroupEncoder::Options options;
    options.raw.resize(static_cast<size_t>(chunks));
    GroupDecoder::Options unchecked;
    unchecked.check = false;
    absl::Span<const ChunkRow> rows;
    for (const Layer& layer : layers) {
      rows =
          absl::MakeSpan(layer.rows)
              .subspan(static_cast<size_t>(chunk), static_cast<size_t>(chunks));
      if (decoder_.Decode(shape, rows, layer.tensor->groups[index],
                          Stored(*layer.tensor, index), unchecked,
                          sum_.data()) != GroupResult::kOk) {
        return DeltaInvalid(last.info.name, "", "",
                            "has streams that are not what its table says");
      }
      for (size_t c = 0; c < rows.size(); ++c) {
        if (rows[c].method == ChunkMethod::kRaw) options.raw[c] = true;
      }
    }
    EncodedGroup merged =
        encoder_.Encode(shape, zeros_.data(), sum_.data(), options);
    for (size_t c = 0; c < rows.size(); ++c) merged.rows[c].crc = rows[c].crc;
    return merged;
  }

 private:
  static const uint8_t* Stored(const DeltaTensor& tensor, size_t index) {
    int64_t offset = 0;
    for (size_t g = 0; g < index; ++g) {
      offset += tensor.groups[g].stored_bytes();
    }
    return reinterpret_cast<const uint8_t*>(tensor.payload.data()) + offset;
  }

  GroupEncoder encoder_;
  GroupDecoder decoder_;
  std::vector<uint8_t> zeros_, sum_;
};

absl::StatusOr<EncodedTensor> MergeTensor(
    absl::Span<const DeltaFile* const> deltas, const DeltaTensor& last,
    Merger& merger) {
  EncodedTensor merged;
  merged.info = last.info;
  merged.hash = last.hash;
  std::vector<Layer> layers;
  for (const DeltaFile* delta : deltas) {
    const DeltaTensor* tensor = Find(*delta, last.info.name);
    if (tensor == nullptr) continue;
    if (tensor->fresh) {
      // What was before is gone.
      layers.clear();
      merged.fresh = true;
    }
    if (!tensor->changed()) continue;
    Layer layer;
    layer.tensor = tensor;
    GW_ASSIGN_OR_RETURN(layer.rows, DeltaFile::ReadRows(*tensor));
    layers.push_back(std::move(layer));
  }
  if (layers.empty()) return merged;
  for (const Layer& layer : layers) {
    if (layer.tensor->info != last.info) {
      return DeltaInvalid(last.info.name, "", "",
                          "changes its dtype or shape without being fresh");
    }
    if (!SameCuts(*layer.tensor, *layers.back().tensor)) {
      return ShardsDiffer(last.info.name);
    }
  }
  int64_t chunk = 0;
  for (size_t g = 0; g < layers.back().tensor->groups.size(); ++g) {
    GW_ASSIGN_OR_RETURN(EncodedGroup group,
                        merger.MergeGroup(layers, g, chunk));
    chunk += group.group.chunks;
    merged.groups.push_back(std::move(group));
  }
  return merged;
}

}  // namespace

absl::StatusOr<std::string> MergeDeltas(
    absl::Span<const DeltaFile* const> deltas) {
  if (deltas.empty()) {
    return DeltaInvalid("deltas", "0", "1", "are none");
  }
  for (size_t i = 1; i < deltas.size(); ++i) {
    const std::string& expected = deltas[i]->info().prev_id;
    const std::string& have = deltas[i - 1]->info().id;
    if (expected == have) continue;
    return ErrorBuilder(absl::StatusCode::kFailedPrecondition,
                        "DELTA_PARENT_MISMATCH")
        .With("expected", expected)
        .With("have", have)
        .Message("a delta applies to weights " + expected +
                 " but the one before it makes " + have);
  }
  std::vector<EncodedTensor> tensors;
  Merger merger;
  for (const DeltaTensor& last : deltas.back()->tensors()) {
    GW_ASSIGN_OR_RETURN(EncodedTensor merged,
                        MergeTensor(deltas, last, merger));
    tensors.push_back(std::move(merged));
  }
  const DeltaInfo& first = deltas.front()->info();
  const DeltaInfo& last = deltas.back()->info();
  DeltaOptions options;
  options.model = last.model;
  options.step = last.step;
  options.prev_id = first.prev_id;
  options.base_id = last.base_id;
  options.chain_length = first.chain_length;
  return AssembleDelta(std::move(tensors), options);
}

}  // namespace gradwire
