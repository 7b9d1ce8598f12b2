// SPDX-License-Identifier: Apache-2.0
// One row per parameter: name, shape, init, place. Allocation, loading, Adam
// and export all walk this table; a parameter's name is spelled once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"

namespace gradwire {

enum class ParamGroup { kEmbedding, kAttention, kMlp, kNorm, kHead };

struct ParamRow {
  std::string hf_name;  // "model.layers.3.self_attn.q_proj.weight"
  std::vector<int64_t> shape;
  int layer = -1;  // -1: outside the blocks
  ParamGroup group = ParamGroup::kNorm;
  // Elements from the start of the whole flat parameter vector.
  int64_t offset = 0;
  int64_t num_elements = 0;
  // Of its sums of squares (kernels/squares.h) from the start of those of all
  // parameters; a vector is a matrix of one row.
  int64_t squares_offset = 0;
  int64_t num_squares = 0;
};

// Where one block's parameters lie, in elements from the start of the flat
// vector; -1 where the model has no such parameter. q, k, v lie next to each
// other without a gap, so that qkv is one [QkvWidth, hidden] matrix (and one
// bias); so do gate and up, one [2 * ffn, hidden] matrix. Their sums of squares
// do as well.
struct BlockOffsets {
  int64_t input_norm = -1;  // [hidden]
  int64_t qkv = -1;         // [QkvWidth, hidden]
  int64_t qkv_bias = -1;    // [QkvWidth]
  int64_t q_norm = -1;      // [head_dim]
  int64_t k_norm = -1;      // [head_dim]
  int64_t o = -1;           // [hidden, AttentionWidth]
  int64_t post_norm = -1;   // [hidden]
  int64_t gate_up = -1;     // [2 * ffn, hidden]
  int64_t down = -1;        // [hidden, ffn]
};

// The flat vector: embedding, blocks in order, final norm, head (absent when
// tied: the head is the embedding). Every group begins at a multiple of 64
// elements; gaps hold zeros and stay zero under AdamW.
class ParamTable {
 public:
  explicit ParamTable(const ModelConfig& config);

  const std::vector<ParamRow>& rows() const { return rows_; }
  const std::vector<BlockOffsets>& blocks() const { return blocks_; }
  int64_t embedding() const { return embedding_; }    // [vocab, hidden]
  int64_t final_norm() const { return final_norm_; }  // [hidden]
  int64_t head() const { return head_; }              // [vocab, hidden]
  // Where what is used together begins: the embedding, each block, the final
  // norm with the head. Multiples of 64.
  std::vector<int64_t> unit_begins() const;
  // Length of the flat vector, gaps included.
  int64_t num_elements() const { return num_elements_; }
  // Sums of squares of all parameters.
  int64_t num_squares() const { return num_squares_; }
  // Those of the parameter that begins with element `offset`.
  int64_t SquaresOffset(int64_t offset) const;
  // Parameters, gaps excluded, tied ones once.
  int64_t num_parameters() const { return num_parameters_; }
  // The row of a Hugging Face name, or null.
  const ParamRow* Find(const std::string& hf_name) const;

 private:
  std::vector<ParamRow> rows_;
  std::vector<BlockOffsets> blocks_;
  int64_t embedding_ = 0;
  int64_t final_norm_ = 0;
  int64_t head_ = 0;
  int64_t num_elements_ = 0;
  int64_t num_parameters_ = 0;
  int64_t num_squares_ = 0;
};

}  // namespace gradwire
