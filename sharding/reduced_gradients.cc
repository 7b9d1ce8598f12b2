// SPDX-License-Identifier: Apache-2.0
#include "sharding/reduced_gradients.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "sharding/collective_error.h"

namespace gradwire {
namespace {

// Elements of every shard in a piece of a unit. While the first piece is made
// there may be nothing to send; smaller ones cost more than their bytes.
constexpr int64_t kMaxPieces = 8;
constexpr int64_t kMinPieceElements = 1 << 12;

int64_t PieceElements(const ShardUnit& unit) {
  return std::max(kMinPieceElements,
                  (unit.shard + kMaxPieces - 1) / kMaxPieces);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ReducedGradients>> ReducedGradients::Create(
    const ShardLayout& layout, const UnitPlaces& places, const Tensor& shard,
    Collectives& collectives, Device& device) {
  GW_CHECK(shard.num_elements() == layout.shard_elements());
  std::unique_ptr<ReducedGradients> gradients(
      new ReducedGradients(layout, places, shard, collectives, device));
  GW_ASSIGN_OR_RETURN(gradients->buffer_, device.Allocate(places.total() * 4));
  float* at = static_cast<float*>(gradients->buffer_->data());
  for (const int64_t elements : places.elements) {
    gradients->buffers_.emplace_back().memory =
        Tensor(at, DType::kF32, {elements});
    at += elements;
  }
  return gradients;
}

ReducedGradients::~ReducedGradients() {
  bool busy = false;
  for (const Buffer& buffer : buffers_) busy = busy || buffer.on_its_way;
  if (busy) collectives_.Abort(RankStopped(collectives_.rank()));
}

void ReducedGradients::Settle(Stream& stream, Buffer& buffer) {
  if (!buffer.on_its_way) return;
  buffer.on_its_way = false;
  const absl::Status status = collectives_.Wait(stream, buffer.ticket);
  if (!status.ok()) stream.Fail(status);
}

UnitGradients::Place ReducedGradients::Begin(Stream& stream, int unit) {
  Buffer& buffer = BufferOf(unit);
  GW_CHECK(!buffer.held);
  Settle(stream, buffer);
  buffer.unit = unit;
  buffer.held = true;
  buffer.sent.clear();
  const int64_t size = layout_.unit(unit).size();
  // Another unit may have left something behind this one's end.
  device_.Zero(stream, buffer.memory.Rows(size, layout_.PaddedSize(unit)));
  return {buffer.memory.Rows(0, size), /*accumulate=*/false};
}

void ReducedGradients::End(Stream& stream, int unit) {
  Buffer& buffer = BufferOf(unit);
  GW_CHECK(buffer.unit == unit && buffer.held && buffer.sent.empty());
  buffer.held = false;
  buffer.on_its_way = true;
  const ShardUnit& u = layout_.unit(unit);
  buffer.ticket = collectives_.ReduceScatter(
      stream, buffer.memory.Rows(0, layout_.PaddedSize(unit)),
      shard_.Rows(u.offset, u.offset + u.shard), accumulate_);
}

void ReducedGradients::EndPart(Stream& stream, int unit, int64_t begin,
                               int64_t end, const MakePart& make) {
  Buffer& buffer = BufferOf(unit);
  GW_CHECK(buffer.unit == unit && (buffer.held || !buffer.sent.empty()));
  const ShardUnit& u = layout_.unit(unit);
  const int64_t most = PieceElements(u);
  const int64_t pieces = (u.shard + most - 1) / most;
  buffer.sent.resize(static_cast<size_t>(pieces));
  for (int64_t p = 0; p < pieces; ++p) {
    if (buffer.sent[static_cast<size_t>(p)]) continue;
    const int64_t from = p * most, to = std::min(u.shard, from + most);
    const auto in_unit = [&](int rank, int64_t at) {
      return std::min(u.size(), rank * u.shard + at);
    };
    const bool within = [&] {
      for (int r = 0; r < layout_.world(); ++r) {
        const int64_t first = in_unit(r, from), last = in_unit(r, to);
        if (first < last && (first < begin || last > end)) return false;
      }
      return true;
    }();
    if (!within) continue;
    for (int r = 0; r < layout_.world() && make; ++r) {
      make(in_unit(r, from), in_unit(r, to));
    }
    buffer.on_its_way = true;
    buffer.ticket = collectives_.ReduceScatterParts(
        stream, buffer.memory.Rows(from, (layout_.world() - 1) * u.shard + to),
        u.shard, shard_.Rows(u.offset + from, u.offset + to), accumulate_);
    buffer.sent[static_cast<size_t>(p)] = true;
  }
  buffer.held = std::find(buffer.sent.begin(), buffer.sent.end(), false) !=
                buffer.sent.end();
}

Tensor ReducedGradients::Spare(Stream& stream, int unit) {
  Buffer& buffer = BufferOf(unit);
  GW_CHECK(!buffer.held);
  Settle(stream, buffer);
  return buffer.memory;
}

void ReducedGradients::Finish(Stream& stream) {
  for (Buffer& buffer : buffers_) {
    GW_CHECK(!buffer.held);
    Settle(stream, buffer);
  }
}

}  // namespace gradwire
