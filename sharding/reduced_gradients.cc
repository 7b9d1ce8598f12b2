// SPDX-License-Identifier: Apache-2.0
#include "sharding/reduced_gradients.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "sharding/collective_error.h"

namespace gradwire {
namespace {

// Elements of a shard in a piece of it: as many pieces as there are blocks,
// which end behind it.
int64_t PieceElements(const ShardLayout& layout, int unit) {
  const int64_t pieces = std::max(1, layout.num_units() - 2);
  constexpr int64_t kTo = ShardLayout::kMinAlignment;
  return ((layout.unit(unit).shard + pieces - 1) / pieces + kTo - 1) / kTo *
         kTo;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ReducedGradients>> ReducedGradients::Create(
    const ShardLayout& layout, const UnitPlaces& places, const Tensor& shard,
    int slow_unit, Collectives& collectives, Device& device) {
  GW_CHECK(shard.num_elements() == layout.shard_elements());
  std::unique_ptr<ReducedGradients> gradients(
      new ReducedGradients(layout, places, shard, collectives, device));
  GW_ASSIGN_OR_RETURN(gradients->buffer_,
                      device.Allocate(Bytes(layout, places, slow_unit)));
  float* at = static_cast<float*>(gradients->buffer_->data());
  const auto take = [&](int64_t elements) {
    Tensor memory(at, DType::kF32, {elements});
    at += elements;
    return memory;
  };
  for (const int64_t elements : places.elements) {
    gradients->buffers_.emplace_back().memory = take(elements);
  }
  for (Buffer& piece : gradients->pieces_) {
    if (slow_unit < 0) break;
    piece.memory = take(layout.world() * PieceElements(layout, slow_unit));
  }
  return gradients;
}

int64_t ReducedGradients::Bytes(const ShardLayout& layout,
                                const UnitPlaces& places, int slow_unit) {
  int64_t elements = places.total();
  if (slow_unit >= 0) {
    elements += 2 * layout.world() * PieceElements(layout, slow_unit);
  }
  return elements * 4;
}

ReducedGradients::~ReducedGradients() {
  bool busy = pieces_[0].on_its_way || pieces_[1].on_its_way;
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
  buffer.held = true;
  const int64_t size = layout_.unit(unit).size();
  // Another unit may have left something behind this one's end.
  device_.Zero(stream, buffer.memory.Rows(size, layout_.PaddedSize(unit)));
  return {buffer.memory.Rows(0, size), /*accumulate=*/false};
}

void ReducedGradients::End(Stream& stream, int unit) {
  Buffer& buffer = BufferOf(unit);
  GW_CHECK(buffer.held);
  buffer.held = false;
  buffer.on_its_way = true;
  const ShardUnit& u = layout_.unit(unit);
  buffer.ticket = collectives_.ReduceScatter(
      stream, buffer.memory.Rows(0, layout_.PaddedSize(unit)),
      shard_.Rows(u.offset, u.offset + u.shard), accumulate_);
  SendPiece(stream);
}

void ReducedGradients::EndInPieces(
    Stream& stream, int unit,
    std::function<void(int64_t begin, int64_t end)> make) {
  Buffer& buffer = BufferOf(unit);
  GW_CHECK(buffer.held && slow_unit_ < 0 && !pieces_[0].memory.is_null());
  buffer.held = false;
  slow_unit_ = unit;
  next_piece_ = 0;
  make_ = std::move(make);
  // While there is nothing else to send.
  SendPiece(stream);
  SendPiece(stream);
}

void ReducedGradients::SendPiece(Stream& stream) {
  if (slow_unit_ < 0) return;
  const ShardUnit& u = layout_.unit(slow_unit_);
  const Tensor& memory = BufferOf(slow_unit_).memory;
  const int64_t most = PieceElements(layout_, slow_unit_);
  const int64_t begin = next_piece_, end = std::min(u.shard, begin + most);
  const int64_t n = end - begin;
  Buffer& piece = pieces_[begin / most % 2];
  Settle(stream, piece);
  for (int r = 0; r < layout_.world(); ++r) {
    make_(std::min(u.size(), r * u.shard + begin),
          std::min(u.size(), r * u.shard + end));
    device_.Copy(stream, memory.Rows(r * u.shard + begin, r * u.shard + end),
                 piece.memory.Rows(r * n, (r + 1) * n));
  }
  piece.on_its_way = true;
  piece.ticket = collectives_.ReduceScatter(
      stream, piece.memory.Rows(0, layout_.world() * n),
      shard_.Rows(u.offset + begin, u.offset + end), accumulate_);
  next_piece_ = end;
  if (end == u.shard) {
    slow_unit_ = -1;
    make_ = nullptr;
  }
}

Tensor ReducedGradients::Spare(Stream& stream, int unit) {
  Buffer& buffer = BufferOf(unit);
  GW_CHECK(!buffer.held && slow_unit_ < 0);
  Settle(stream, buffer);
  return buffer.memory;
}

void ReducedGradients::Finish(Stream& stream) {
  GW_CHECK(slow_unit_ < 0);
  for (Buffer& buffer : buffers_) Settle(stream, buffer);
  for (Buffer& piece : pieces_) Settle(stream, piece);
}

}  // namespace gradwire
