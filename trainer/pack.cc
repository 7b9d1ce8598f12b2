// SPDX-License-Identifier: Apache-2.0
#include "trainer/pack.h"

#include <algorithm>
#include <unordered_map>

namespace gradwire {
namespace {

// Fewer spared rows than one in so many are not worth the copies.
constexpr int64_t kLeastShare = 16;

struct Step {
  int32_t parent;  // the row before, -1 at the beginning of a sequence
  int32_t token;
  bool operator==(const Step&) const = default;
};
struct HashStep {
  size_t operator()(const Step& s) const {
    return static_cast<size_t>(s.parent) * 0x9e3779b97f4a7c15u ^
           static_cast<size_t>(s.token) * 0xff51afd7ed558ccdu;
  }
};

// Adds row after row; finds those that are there already.
class Rows {
 public:
  explicit Rows(PackedInputs& inputs) : inputs_(inputs) {}

  // The row of a token that follows `parent`'s, with k targets.
  int32_t Find(int32_t parent, int32_t token, const int32_t* targets) {
    const auto [begin, end] = known_.equal_range({parent, token});
    for (auto at = begin; at != end; ++at) {
      if (std::equal(targets, targets + inputs_.k,
                     inputs_.targets.begin() + at->second * inputs_.k)) {
        return at->second;
      }
    }
    const int32_t row = Add(parent, token, targets);
    known_.emplace(Step{parent, token}, row);
    return row;
  }

  int32_t Add(int32_t parent, int32_t token, const int32_t* targets) {
    const auto row = static_cast<int32_t>(inputs_.num_rows());
    inputs_.tokens.push_back(token);
    inputs_.positions.push_back(
        parent < 0 ? 0 : inputs_.positions[static_cast<size_t>(parent)] + 1);
    inputs_.targets.insert(inputs_.targets.end(), targets, targets + inputs_.k);
    return row;
  }

 private:
  PackedInputs& inputs_;
  std::unordered_multimap<Step, int32_t, HashStep> known_;
};

PackedInputs PackRows(const std::vector<TrainDatum>& data,
                      const MicroBatch& batch, bool share) {
  PackedInputs inputs;
  inputs.k = batch.k;
  inputs.tokens.reserve(static_cast<size_t>(batch.tokens));
  inputs.positions.reserve(static_cast<size_t>(batch.tokens));
  inputs.targets.reserve(static_cast<size_t>(batch.tokens * batch.k));
  inputs.cu_seqlens.push_back(0);
  Rows rows(inputs);
  int32_t token = 0;
  for (int64_t i = batch.begin; i < batch.end; ++i) {
    const TrainDatum& datum = data[static_cast<size_t>(i)];
    int32_t row = -1;
    for (size_t t = 0; t < datum.tokens.size(); ++t, ++token) {
      const int32_t* targets =
          datum.targets.data() + static_cast<int64_t>(t) * batch.k;
      row = share ? rows.Find(row, datum.tokens[t], targets)
                  : rows.Add(row, datum.tokens[t], targets);
      if (!share) continue;
      inputs.row_of.push_back(row);
      if (row == static_cast<int32_t>(inputs.token_of.size())) {
        inputs.token_of.push_back(token);
      }
    }
    inputs.cu_seqlens.push_back(token);
  }
  return inputs;
}

}  // namespace

std::vector<float> PackedInputs::SumOfRows(
    const std::vector<float>& of_tokens) const {
  if (!shares_rows()) return of_tokens;
  std::vector<float> out(static_cast<size_t>(num_rows() * k), 0.0f);
  for (size_t t = 0; t < row_of.size(); ++t) {
    for (int64_t j = 0; j < k; ++j) {
      out[static_cast<size_t>(row_of[t] * k + j)] +=
          of_tokens[t * static_cast<size_t>(k) + static_cast<size_t>(j)];
    }
  }
  return out;
}

PackedInputs Pack(const std::vector<TrainDatum>& data,
                  const MicroBatch& batch) {
  if (batch.end - batch.begin > 1) {
    PackedInputs shared = PackRows(data, batch, /*share=*/true);
    const int64_t spared = shared.num_tokens() - shared.num_rows();
    if (spared * kLeastShare >= shared.num_tokens() && spared > 0) {
      return shared;
    }
  }
  return PackRows(data, batch, /*share=*/false);
}

}  // namespace gradwire
