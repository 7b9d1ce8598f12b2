// SPDX-License-Identifier: Apache-2.0
#include "sharding/reduced_gradients.h"

#include "base/check.h"
#include "base/status.h"
#include "sharding/collective_error.h"

namespace gradwire {

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
  for (const Buffer& buffer : buffers_) {
    if (!buffer.on_its_way) continue;
    collectives_.Abort(RankStopped(collectives_.rank()));
    return;
  }
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
}

void ReducedGradients::Finish(Stream& stream) {
  for (Buffer& buffer : buffers_) Settle(stream, buffer);
}

}  // namespace gradwire
