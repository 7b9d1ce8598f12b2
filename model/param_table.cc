// SPDX-License-Identifier: Apache-2.0
#include "model/param_table.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

// Groups start at multiples of a cache line of float32, times four.
constexpr int64_t kAlignElements = 64;

}  // namespace

ParamTable::ParamTable(const ModelConfig& config) {
  int64_t end = 0;
  auto align = [&] {
    end = (end + kAlignElements - 1) / kAlignElements * kAlignElements;
    return end;
  };
  auto add = [&](const std::string& name, std::vector<int64_t> shape, int layer,
                 ParamGroup group) {
    ParamRow row;
    row.hf_name = name;
    row.num_elements = 1;
    for (int64_t dim : shape) row.num_elements *= dim;
    row.squares_offset = num_squares_;
    row.num_squares =
        row.num_elements / shape.back() * SquareBlocks(shape.back());
    num_squares_ += row.num_squares;
    row.shape = std::move(shape);
    row.layer = layer;
    row.group = group;
    row.offset = end;
    end += row.num_elements;
    num_parameters_ += row.num_elements;
    rows_.push_back(std::move(row));
  };

  const int64_t hidden = config.hidden;
  const int64_t q = config.heads * config.head_dim;
  const int64_t kv = config.kv_heads * config.head_dim;
  embedding_ = align();
  add("model.embed_tokens.weight", {config.vocab, hidden}, -1,
      ParamGroup::kEmbedding);
  for (int layer = 0; layer < config.layers; ++layer) {
    const std::string block = "model.layers." + std::to_string(layer) + ".";
    const std::string attention = block + "self_attn.";
    BlockOffsets at;
    at.input_norm = align();
    add(block + "input_layernorm.weight", {hidden}, layer, ParamGroup::kNorm);
    at.qkv = align();
    add(attention + "q_proj.weight", {q, hidden}, layer,
        ParamGroup::kAttention);
    add(attention + "k_proj.weight", {kv, hidden}, layer,
        ParamGroup::kAttention);
    add(attention + "v_proj.weight", {kv, hidden}, layer,
        ParamGroup::kAttention);
    if (config.qkv_bias) {
      at.qkv_bias = align();
      add(attention + "q_proj.bias", {q}, layer, ParamGroup::kAttention);
      add(attention + "k_proj.bias", {kv}, layer, ParamGroup::kAttention);
      add(attention + "v_proj.bias", {kv}, layer, ParamGroup::kAttention);
    }
    if (config.qk_norm) {
      at.q_norm = align();
      add(attention + "q_norm.weight", {config.head_dim}, layer,
          ParamGroup::kNorm);
      at.k_norm = align();
      add(attention + "k_norm.weight", {config.head_dim}, layer,
          ParamGroup::kNorm);
    }
    at.o = align();
    add(attention + "o_proj.weight", {hidden, q}, layer,
        ParamGroup::kAttention);
    at.post_norm = align();
    add(block + "post_attention_layernorm.weight", {hidden}, layer,
        ParamGroup::kNorm);
    at.gate_up = align();
    add(block + "mlp.gate_proj.weight", {config.ffn, hidden}, layer,
        ParamGroup::kMlp);
    add(block + "mlp.up_proj.weight", {config.ffn, hidden}, layer,
        ParamGroup::kMlp);
    at.down = align();
    add(block + "mlp.down_proj.weight", {hidden, config.ffn}, layer,
        ParamGroup::kMlp);
    blocks_.push_back(at);
  }
  final_norm_ = align();
  add("model.norm.weight", {hidden}, -1, ParamGroup::kNorm);
  if (config.tied_embeddings) {
    head_ = embedding_;
  } else {
    head_ = align();
    add("lm_head.weight", {config.vocab, hidden}, -1, ParamGroup::kHead);
  }
  num_elements_ = align();
}

std::vector<int64_t> ParamTable::unit_begins() const {
  std::vector<int64_t> begins = {embedding_};
  for (const BlockOffsets& block : blocks_) begins.push_back(block.input_norm);
  begins.push_back(final_norm_);
  return begins;
}

int64_t ParamTable::SquaresOffset(int64_t offset) const {
  const auto row = std::lower_bound(
      rows_.begin(), rows_.end(), offset,
      [](const ParamRow& r, int64_t at) { return r.offset < at; });
  GW_CHECK(row != rows_.end() && row->offset == offset);
  return row->squares_offset;
}

const ParamRow* ParamTable::Find(const std::string& hf_name) const {
  for (const ParamRow& row : rows_) {
    if (row.hf_name == hf_name) return &row;
  }
  return nullptr;
}

}  // namespace gradwire
