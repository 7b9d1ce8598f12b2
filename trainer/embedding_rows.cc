// SPDX-License-Identifier: Apache-2.0
#include "trainer/embedding_rows.h"

#include <algorithm>

#include "base/check.h"
#include "base/status.h"
#include "device/arena.h"

namespace gradwire {
namespace {

constexpr int32_t kNone = -1;

}  // namespace

int64_t EmbeddingRows::Bytes(const Options& options) {
  const int64_t ids = options.layout->world() * options.max_tokens * 4;
  return Arena::AlignedBytes(3 * ids) + Arena::AlignedBytes(options.hidden * 4);
}

absl::StatusOr<std::unique_ptr<EmbeddingRows>> EmbeddingRows::Create(
    const Options& options, const Tensor& shard, ReducedGradients& gradients,
    Collectives& collectives, Device& device, Kernels& kernels) {
  GW_CHECK(shard.num_elements() == options.layout->shard_elements());
  GW_CHECK(options.layout->unit(0).size() >= options.vocab * options.hidden);
  std::unique_ptr<EmbeddingRows> rows(new EmbeddingRows(
      options, shard, gradients, collectives, device, kernels));
  GW_ASSIGN_OR_RETURN(rows->buffer_, device.Allocate(Bytes(options)));
  const int64_t n = options.layout->world() * options.max_tokens;
  char* const at = static_cast<char*>(rows->buffer_->data());
  rows->all_ids_ = Tensor(at, DType::kI32, {n});
  rows->lists_ = Tensor(at + 4 * n, DType::kI32, {2 * n});
  rows->edge_row_ = Tensor(at + Arena::AlignedBytes(12 * n), DType::kF32,
                           {1, options.hidden});
  rows->ids_stream_ = device.NewStream();
  return rows;
}

void EmbeddingRows::Announce(const std::vector<int32_t>& ids) {
  const int64_t n = options_.max_tokens;
  GW_CHECK(std::ssize(ids) <= n);
  own_ids_ = ids;
  own_ids_.resize(static_cast<size_t>(n), kNone);
  const int rank = collectives_.rank();
  const Tensor own = all_ids_.Rows(rank * n, (rank + 1) * n);
  device_.CopyFromHost(*ids_stream_, own_ids_.data(), own);
  announced_ = collectives_.AllGather(*ids_stream_, own, all_ids_);
}

bool EmbeddingRows::Await(Stream& stream) {
  absl::Status status = collectives_.Wait(*ids_stream_, announced_);
  const int world = options_.layout->world();
  const int64_t n = options_.max_tokens;
  std::vector<int32_t> all(static_cast<size_t>(world * n), kNone);
  device_.CopyToHost(*ids_stream_, all_ids_, all.data());
  status.Update(ids_stream_->Finish());
  if (!status.ok()) {
    // Nothing of it counts, and there is no group any more.
    stream.Fail(status);
    std::fill(all.begin(), all.end(), kNone);
  }
  ids_.clear();
  most_ = 0;
  for (int r = 0; r < world; ++r) {
    const auto begin = all.begin() + r * n;
    ids_.emplace_back(begin, std::find(begin, begin + n, kNone));
    most_ = std::max<int64_t>(most_, std::ssize(ids_.back()));
  }
  // All rows, and those that are picked of them, lie where the table was.
  return 2 * RowBytes() <= options_.layout->PaddedSize(0) * 4;
}

int64_t EmbeddingRows::RowBytes() const {
  return Arena::AlignedBytes(
      options_.act, {options_.layout->world() * most_, options_.hidden});
}

Tensor EmbeddingRows::Held(int64_t begin, int64_t end) const {
  const ShardPiece own = options_.layout->Owned(0, collectives_.rank());
  GW_CHECK(own.begin <= begin && begin <= end && end <= own.end);
  const int64_t at = own.offset + begin - own.begin;
  return shard_.Rows(at, at + end - begin);
}

void EmbeddingRows::AddListed(Stream& stream, const Tensor& all,
                              const Listed& listed, const Tensor& table) {
  const int64_t n = std::ssize(listed.ids);
  if (n == 0) return;
  const int64_t half = lists_.num_elements() / 2;
  const Tensor positions = lists_.Rows(listed_, listed_ + n);
  const Tensor ids = lists_.Rows(half + listed_, half + listed_ + n);
  const Tensor rows = picked_.Rows(listed_, listed_ + n);
  listed_ += n;
  device_.CopyFromHost(stream, listed.positions.data(), positions);
  device_.CopyFromHost(stream, listed.ids.data(), ids);
  kernels_.GatherRows(stream, all, positions, rows);
  kernels_.EmbeddingBackward(stream, ids, rows, table, Tensor());
}

void EmbeddingRows::Add(Stream& stream, const Tensor& rows, bool accumulate) {
  const ShardLayout& layout = *options_.layout;
  const int64_t world = layout.world(), hidden = options_.hidden;
  const int rank = collectives_.rank();
  const Tensor memory = gradients_.Spare(stream, 0);
  Collectives::Ticket handed_out = 0;
  Tensor all;
  if (most_ > 0) {
    const int64_t n = world * most_;
    all = Tensor(memory.raw(), options_.act, {n, hidden});
    picked_ = Tensor(static_cast<char*>(memory.raw()) + RowBytes(),
                     options_.act, {n, hidden});
    GW_CHECK(2 * RowBytes() <= memory.bytes());
    if (!rows.is_null()) {
      const int64_t first = rank * most_;
      device_.Copy(stream, rows, all.Rows(first, first + rows.dim(0)));
    }
    handed_out = collectives_.AllGather(
        stream, all.Rows(rank * most_, (rank + 1) * most_), all);
  }
  // What rows are added to.
  gradients_.Finish(stream);
  const ShardUnit& unit = layout.unit(0);
  if (!options_.tied && !accumulate) {
    device_.Zero(stream, shard_.Rows(unit.offset, unit.offset + unit.shard));
  }
  if (most_ == 0) return;
  const absl::Status status = collectives_.Wait(stream, handed_out);
  if (!status.ok()) stream.Fail(status);

  // Whole rows of the table in this shard, and the parts of rows at its ends.
  const ShardPiece own = layout.Owned(0, rank);
  const int64_t end_of_table = options_.vocab * hidden;
  const int64_t begin = std::min(own.begin, end_of_table);
  const int64_t end = std::min(own.end, end_of_table);
  if (begin == end) return;
  const int64_t first = (begin + hidden - 1) / hidden;
  const int64_t last = std::max(first, end / hidden);
  const int64_t edge_ids[2] = {begin / hidden, (end - 1) / hidden};
  inner_ = edges_[0] = edges_[1] = Listed();
  for (int r = 0; r < world; ++r) {
    const auto& ids = ids_[static_cast<size_t>(r)];
    for (size_t i = 0; i < ids.size(); ++i) {
      const int64_t id = ids[i];
      const auto place =
          static_cast<int32_t>(r * most_ + static_cast<int64_t>(i));
      if (first <= id && id < last) {
        inner_.positions.push_back(place);
        inner_.ids.push_back(static_cast<int32_t>(id - first));
      } else if (id == edge_ids[0]) {
        edges_[0].positions.push_back(place);
        edges_[0].ids.push_back(0);
      } else if (id == edge_ids[1]) {
        edges_[1].positions.push_back(place);
        edges_[1].ids.push_back(0);
      }
    }
  }
  listed_ = 0;
  if (first < last) {
    AddListed(
        stream, all, inner_,
        Held(first * hidden, last * hidden).Reshape({last - first, hidden}));
  }
  for (int e = 0; e < 2; ++e) {
    if (edges_[e].ids.empty()) continue;
    const int64_t row = edge_ids[e] * hidden;
    const int64_t from = std::max(begin, row), to = std::min(end, row + hidden);
    const Tensor held = Held(from, to);
    const Tensor part = edge_row_.Reshape({hidden}).Rows(from - row, to - row);
    device_.Copy(stream, held, part);
    AddListed(stream, all, edges_[e], edge_row_);
    device_.Copy(stream, part, held);
  }
}

}  // namespace gradwire
