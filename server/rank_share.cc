// SPDX-License-Identifier: Apache-2.0
#include "server/rank_share.h"

#include <utility>

#include "base/check.h"

namespace gradwire {
namespace {

using Commands = std::vector<v1::RankCommand>;

v1::DatumChunk* Batch(v1::RankCommand& command, const v1::DatumChunk&) {
  return command.mutable_datums();
}
v1::GradientChunk* Batch(v1::RankCommand& command, const v1::GradientChunk&) {
  return command.mutable_gradients();
}
auto* Items(v1::DatumChunk& chunk) { return chunk.mutable_datums(); }
auto* Items(v1::GradientChunk& chunk) { return chunk.mutable_items(); }

int64_t IndexOf(const v1::Datum&, int64_t count) { return count; }
int64_t IndexOf(const v1::GradientItem& item, int64_t) {
  return item.datum_index();
}

// Cuts every chunk into one for each rank that has something of it.
template <typename Chunk>
void Split(std::vector<Chunk>& chunks, const std::vector<int>& rank_of,
           int64_t command_id, std::vector<Commands>& own) {
  const auto add = [&](int rank) {
    v1::RankCommand& command = own[static_cast<size_t>(rank)].emplace_back();
    command.set_command_id(command_id);
    return Batch(command, Chunk());
  };
  int64_t count = 0;
  for (Chunk& chunk : chunks) {
    if (own.size() == 1) {
      add(0)->Swap(&chunk);
      continue;
    }
    std::vector<Chunk*> parts(own.size());
    for (auto& item : *Items(chunk)) {
      const int rank = rank_of.at(static_cast<size_t>(IndexOf(item, count++)));
      Chunk*& part = parts[static_cast<size_t>(rank)];
      if (part == nullptr) part = add(rank);
      Items(*part)->Add()->Swap(&item);
    }
    chunk.Clear();
  }
}

}  // namespace

Dispatch ShareRequest(OperationRequest request,
                      const std::vector<DatumShape>& shapes,
                      const std::vector<int>& rank_of, int world,
                      int64_t command_id) {
  Dispatch out;
  out.own.resize(static_cast<size_t>(world));
  Split(request.datums, rank_of, command_id, out.own);
  Split(request.gradients, rank_of, command_id, out.own);
  out.command = std::move(request.command);
  out.command.set_command_id(command_id);
  if (world == 1) return out;
  if (out.command.has_forward()) {
    GW_CHECK(shapes.size() == rank_of.size());
    v1::RankForward& forward = *out.command.mutable_forward();
    for (const DatumShape& shape : shapes) {
      forward.add_tokens(shape.n);
      forward.add_k(shape.k);
    }
    forward.mutable_rank_of()->Add(rank_of.begin(), rank_of.end());
  } else if (out.command.has_backward()) {
    out.command.mutable_backward()->mutable_rank_of()->Add(rank_of.begin(),
                                                           rank_of.end());
  }
  return out;
}

std::vector<int64_t> OwnDatums(
    const google::protobuf::RepeatedField<int32_t>& rank_of, int rank,
    int64_t count) {
  std::vector<int64_t> own;
  for (int64_t i = 0; i < count; ++i) {
    if (rank_of.empty() || rank_of.Get(static_cast<int>(i)) == rank) {
      own.push_back(i);
    }
  }
  return own;
}

}  // namespace gradwire
