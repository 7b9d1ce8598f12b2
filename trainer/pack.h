// SPDX-License-Identifier: Apache-2.0
// A micro-batch as the model computes it: the datums' tokens one behind the
// other, and the rows that stand for them.
//
// Datums that begin alike (a system prompt, the prompt of a group of samples,
// the two answers of a preference) have the same activations for as long as
// they are alike, and in a causal model whatever follows. Such tokens share one
// row: it is computed once, and its gradient is the sum of theirs. A token
// shares a row only if its targets are the same, too, so that a row has one set
// of logprobs.
#pragma once

#include <cstdint>
#include <vector>

#include "trainer/batch_plan.h"
#include "trainer/trainer.h"

namespace gradwire {

// The inputs of one micro-batch on the host; kept for as long as its
// activations may have to be made again.
struct PackedInputs {
  int64_t k = 1;
  std::vector<int32_t> tokens;      // [rows]
  std::vector<int32_t> positions;   // [rows], within the sequence
  std::vector<int32_t> targets;     // [rows, k]
  std::vector<int32_t> cu_seqlens;  // [sequences + 1], in tokens
  // i32 [tokens]: each token's row; i32 [rows]: the first of a row's tokens.
  // Empty if every token has a row of its own.
  std::vector<int32_t> row_of, token_of;

  int64_t num_rows() const { return static_cast<int64_t>(tokens.size()); }
  int64_t num_tokens() const { return cu_seqlens.back(); }
  bool shares_rows() const { return !row_of.empty(); }

  // Values of rows [rows, width] as values of tokens [tokens, width].
  template <typename T>
  std::vector<T> OfTokens(std::vector<T> of_rows, int64_t width) const {
    if (!shares_rows()) return of_rows;
    std::vector<T> out;
    out.reserve(row_of.size() * static_cast<size_t>(width));
    for (const int32_t row : row_of) {
      const auto begin = of_rows.begin() + row * width;
      out.insert(out.end(), begin, begin + width);
    }
    return out;
  }
  // The sums over each row's tokens, in their order.
  std::vector<float> SumOfRows(const std::vector<float>& of_tokens) const;
};

// Shares rows where that spares a sixteenth of them or more.
PackedInputs Pack(const std::vector<TrainDatum>& data, const MicroBatch& batch);

}  // namespace gradwire
