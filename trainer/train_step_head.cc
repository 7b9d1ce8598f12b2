// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <vector>

#include "trainer/train_step.h"

namespace gradwire {
namespace {

// The head's backward leaves rows out if that spares an eighth of them.
constexpr int64_t kLeastSpared = 8;

}  // namespace

Tensor TrainStep::HeadView(const Tensor& values) const {
  return View(head_unit(), values, options_.table->head(),
              options_.config->vocab);
}

void TrainStep::HeadBackward(const PackedInputs& inputs,
                             const StoredActivations& stored,
                             const std::vector<float>& d_logprobs,
                             const Held& weights, const HeldGradient& held,
                             Bound& bound) {
  const ModelConfig& config = *options_.config;
  const DType act = bound.scratch.normed.dtype();
  Stream& stream = *stream_;
  const Kernels::WeightGrad d_weight = {HeadView(held.head.values),
                                        held.head.accumulate,
                                        Squares(options_.table->head())};
  LogprobHead head;
  head.hidden = bound.scratch.normed;
  head.weight = HeadView(weights.head);
  head.targets = bound.targets;
  Kernels::LogprobHeadGrad grad;
  grad.d_logprobs = bound.d_logprobs;
  grad.lse = stored.lse;
  grad.workspace = bound.head_workspace;
  grad.kept = stored.head;
  const std::vector<float> d_rows = inputs.SumOfRows(d_logprobs);
  const int64_t num_rows = inputs.num_rows(), k = inputs.k;
  std::vector<int32_t> rows;  // that have a gradient
  for (int64_t r = 0; r < num_rows; ++r) {
    const auto begin = d_rows.begin() + r * k;
    if (std::any_of(begin, begin + k, [](float d) { return d != 0; })) {
      rows.push_back(static_cast<int32_t>(r));
    }
  }
  const auto count = static_cast<int64_t>(rows.size());
  const auto alloc = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return scratch_.Alloc("head rows", dtype, shape);
  };
  // The weight's gradient first, if that costs no product, so that there is
  // something to send while the head computes.
  const bool apart = held.send_head != nullptr && !stored.head.is_null();
  const auto backward = [&](const Tensor& d_hidden) {
    if (apart) {
      const auto pieces =
          static_cast<size_t>((config.vocab + head_rows_ - 1) / head_rows_);
      HeadWeight weight = {head, grad, d_weight, std::vector<bool>(pieces)};
      held.send_head([&](int64_t begin, int64_t end) {
        MakeHeadWeight(weight, begin, end);
      });
      // What goes with elements of other parameters.
      MakeHeadWeight(weight, 0, options_.layout->unit(head_unit()).size());
    }
    kernels_.LogprobHeadBackward(
        stream, head, grad, d_hidden,
        apart ? Kernels::WeightGrad{Tensor()} : d_weight);
  };
  // Logits that are made again must have the forward's bits.
  const bool may_leave_out = kernels_.RowsHaveTheirOwnBits(act);
  if (!may_leave_out || count * kLeastSpared > num_rows * (kLeastSpared - 1)) {
    device_.CopyFromHost(stream, d_rows.data(), bound.d_logprobs);
    backward(bound.scratch.hidden);
    return;
  }
  // The others' gradients are zero: prompts, as a rule.
  std::vector<float> d_some;
  std::vector<int32_t> targets;
  for (const int32_t row : rows) {
    const auto d = d_rows.begin() + row * k;
    const auto target = inputs.targets.begin() + row * k;
    d_some.insert(d_some.end(), d, d + k);
    targets.insert(targets.end(), target, target + k);
  }
  grad.kept_rows = alloc(DType::kI32, {count});
  grad.kept_tokens = num_rows;
  grad.d_logprobs = alloc(DType::kF32, {count, k});
  grad.lse = alloc(DType::kF32, {count});
  head.targets = alloc(DType::kI32, {count, k});
  head.hidden = alloc(act, {count, config.hidden});
  const Tensor d_hidden = alloc(act, {count, config.hidden});
  device_.CopyFromHost(stream, rows.data(), grad.kept_rows);
  device_.CopyFromHost(stream, d_some.data(), grad.d_logprobs);
  device_.CopyFromHost(stream, targets.data(), head.targets);
  kernels_.GatherRows(stream, bound.scratch.normed, grad.kept_rows,
                      head.hidden);
  kernels_.GatherRows(stream, stored.lse.Reshape({num_rows, 1}), grad.kept_rows,
                      grad.lse.Reshape({count, 1}));
  backward(d_hidden);
  kernels_.ScatterRows(stream, d_hidden, grad.kept_rows, bound.scratch.hidden);
}

void TrainStep::MakeHeadWeight(HeadWeight& weight, int64_t begin, int64_t end) {
  const int64_t vocab = options_.config->vocab;
  const int64_t hidden = options_.config->hidden;
  const int64_t first =
      options_.table->head() - options_.layout->unit(head_unit()).begin;
  const auto row = [&](int64_t element) {
    return std::clamp<int64_t>(element - first, 0, vocab * hidden) / hidden;
  };
  if (end <= first || begin >= first + vocab * hidden) return;
  for (int64_t piece = row(begin) / head_rows_;
       piece < std::ssize(weight.made) &&
       piece * head_rows_ * hidden < end - first;
       ++piece) {
    if (weight.made[static_cast<size_t>(piece)]) continue;
    weight.made[static_cast<size_t>(piece)] = true;
    kernels_.LogprobHeadBackwardWeight(
        *stream_, weight.head, weight.grad, piece * head_rows_,
        std::min(vocab, (piece + 1) * head_rows_), weight.d_weight);
  }
}

}  // namespace gradwire
