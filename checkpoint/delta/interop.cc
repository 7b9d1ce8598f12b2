// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/delta/interop.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "base/status.h"
#include "checkpoint/delta/file_prefix.h"
#include "checkpoint/delta/packer.h"
#include "checkpoint/delta/scan.h"

namespace gradwire {
namespace {

struct Pair {
  const TensorView* before = nullptr;  // null if fresh
  const TensorView* after = nullptr;
  int64_t element_bytes = 0;
};

absl::StatusOr<std::vector<Pair>> MakePairs(
    absl::Span<const TensorView> before, absl::Span<const TensorView> after) {
  std::map<std::string, const TensorView*> old_tensors;
  for (const TensorView& tensor : before) {
    old_tensors[tensor.info.name] = &tensor;
  }
  std::vector<Pair> pairs;
  for (const TensorView& tensor : after) {
    Pair pair;
    pair.after = &tensor;
    pair.element_bytes = DeltaElementBytes(tensor.info.dtype);
    if (pair.element_bytes == 0) {
      return DeltaInvalid(tensor.info.name, tensor.info.dtype, "",
                          "has an unknown dtype");
    }
    const auto found = old_tensors.find(tensor.info.name);
    if (found != old_tensors.end() && found->second->info == tensor.info) {
      pair.before = found->second;
    }
    pairs.push_back(pair);
  }
  return pairs;
}

// Positions and new values of what changed, appended.
struct Sparse {
  std::vector<int32_t> indices;
  ByteBuffer values;
};

void AppendSparse(const Pair& pair, Sparse& out) {
  const auto* old_bytes = static_cast<const uint8_t*>(pair.before->data);
  const auto* new_bytes = static_cast<const uint8_t*>(pair.after->data);
  const int64_t size = pair.after->info.num_elements();
  const int64_t element = pair.element_bytes;
  auto take = [&](int64_t i) {
    out.indices.push_back(static_cast<int32_t>(i));
    out.values.Append(new_bytes + i * element, element);
  };
  if (element != 2) {
    for (int64_t i = 0; i < size; ++i) {
      if (std::memcmp(old_bytes + i * element, new_bytes + i * element,
                      static_cast<size_t>(element)) != 0) {
        take(i);
      }
    }
    return;
  }
  std::vector<uint16_t> positions(kChunkElements + kScanSlack);
  std::vector<uint64_t> bitmap(kChunkElements / 64);
  for (int64_t first = 0; first < size; first += kChunkElements) {
    const int64_t n = std::min(kChunkElements, size - first);
    const int64_t count = FindChanges(
        reinterpret_cast<const uint16_t*>(old_bytes) + first,
        reinterpret_cast<const uint16_t*>(new_bytes) + first, n, bitmap.data());
    TakePositions(bitmap.data(), n, 0, positions.data());
    for (int64_t i = 0; i < count; ++i) {
      take(first + positions[static_cast<size_t>(i)]);
    }
  }
}

}  // namespace

absl::StatusOr<std::string> EncodeXorDelta(absl::Span<const TensorView> before,
                                           absl::Span<const TensorView> after) {
  GW_ASSIGN_OR_RETURN(const std::vector<Pair> pairs, MakePairs(before, after));
  StreamPacker packer;
  ByteBuffer data;
  std::vector<FileEntry> entries;
  std::vector<uint8_t> difference;
  for (const Pair& pair : pairs) {
    const int64_t bytes = pair.after->info.num_elements() * pair.element_bytes;
    const auto* new_bytes = static_cast<const uint8_t*>(pair.after->data);
    difference.assign(new_bytes, new_bytes + bytes);
    if (pair.before != nullptr) {
      const auto* old_bytes = static_cast<const uint8_t*>(pair.before->data);
      if (bytes == 0 ||
          std::memcmp(old_bytes, new_bytes, static_cast<size_t>(bytes)) == 0) {
        continue;
      }
      for (int64_t i = 0; i < bytes; ++i) {
        difference[static_cast<size_t>(i)] ^= old_bytes[i];
      }
    }
    const int64_t stored = packer.PackFrame(difference.data(), bytes, data);
    entries.push_back({pair.after->info.name, "U8", stored, stored});
  }
  std::string file = FilePrefix({{"format", "xor_zstd"}}, entries);
  file.append(reinterpret_cast<const char*>(data.data()),
              static_cast<size_t>(data.size()));
  return file;
}

absl::StatusOr<std::string> EncodeSparseDelta(
    absl::Span<const TensorView> before, absl::Span<const TensorView> after) {
  GW_ASSIGN_OR_RETURN(const std::vector<Pair> pairs, MakePairs(before, after));
  ByteBuffer data;
  std::vector<FileEntry> entries;
  for (const Pair& pair : pairs) {
    const TensorInfo& info = pair.after->info;
    if (pair.before == nullptr) {
      return DeltaInvalid(info.name, "", "",
                          "was not there before, with this dtype and shape");
    }
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (info.num_elements() > kMost) {
      return DeltaInvalid(info.name, std::to_string(info.num_elements()),
                          std::to_string(kMost), "is too large for indices");
    }
    Sparse sparse;
    AppendSparse(pair, sparse);
    if (sparse.indices.empty()) continue;
    const auto count = static_cast<int64_t>(sparse.indices.size());
    entries.push_back({info.name + ".indices", "I32", count, count * 4});
    entries.push_back(
        {info.name + ".values", info.dtype, count, count * pair.element_bytes});
    data.Append(sparse.indices.data(), count * 4);
    data.Append(sparse.values.data(), sparse.values.size());
  }
  std::string file = FilePrefix({{"format", "sparse"}}, entries);
  file.append(reinterpret_cast<const char*>(data.data()),
              static_cast<size_t>(data.size()));
  return file;
}

}  // namespace gradwire
