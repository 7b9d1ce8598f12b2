// SPDX-License-Identifier: Apache-2.0
#include "trainer/train_step.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/status.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

DType ActType(Precision precision) {
  return precision == Precision::kF32 ? DType::kF32 : DType::kBF16;
}

AttentionShape ShapeOf(const ModelConfig& config) {
  AttentionShape shape;
  shape.heads = config.heads;
  shape.kv_heads = config.kv_heads;
  shape.head_dim = config.head_dim;
  return shape;
}

// `acts` without its input: the part that a recompute makes again. `alloc`
// hands out a tensor of (dtype, shape).
template <typename Alloc>
void LayOutRest(const ModelConfig& config, DType act,
                const PackedInputs& inputs, Alloc alloc,
                BlockActivations& acts) {
  const int64_t rows = inputs.num_rows();
  acts.rstd1 = alloc(DType::kF32, {rows});
  acts.qkv = alloc(act, {rows, config.QkvWidth()});
  acts.attention = alloc(act, {rows, config.AttentionWidth()});
  acts.lse = alloc(DType::kF32, {inputs.num_tokens(), config.heads});
  acts.mid = alloc(act, {rows, config.hidden});
  acts.rstd2 = alloc(DType::kF32, {rows});
  acts.gate_up = alloc(act, {rows, 2 * config.ffn});
}

}  // namespace

int64_t KernelWorkspaceBytes(const Kernels& kernels, const ModelConfig& config,
                             Precision precision, int64_t tokens,
                             int64_t max_positions) {
  const DType act = ActType(precision);
  return Arena::AlignedBytes(
             kernels.AttentionWorkspaceBytes(ShapeOf(config), act, tokens)) +
         Arena::AlignedBytes(kernels.LogprobHeadWorkspaceBytes(
             act, tokens, config.hidden, config.vocab)) +
         2 * Arena::AlignedBytes(max_positions * config.head_dim / 2 * 4) +
         64 * Arena::kAlignment;
}

int64_t HeadKeptBytes(const Kernels& kernels, const ModelConfig& config,
                      Precision precision, int64_t tokens, int64_t k) {
  return Arena::AlignedBytes(kernels.LogprobHeadKeptBytes(
      ActType(precision), tokens, k, config.vocab));
}

TrainStep::TrainStep(const Options& options, Device& device, Kernels& kernels)
    : options_(options),
      device_(device),
      kernels_(kernels),
      head_rows_(kernels.LogprobHeadWeightRows(ActType(options.precision))) {}

absl::StatusOr<std::unique_ptr<TrainStep>> TrainStep::Create(
    const Options& options, Device& device, Kernels& kernels) {
  std::unique_ptr<TrainStep> step(new TrainStep(options, device, kernels));
  GW_ASSIGN_OR_RETURN(step->scratch_,
                      Arena::Create(device, options.scratch_bytes));
  step->stream_ = device.NewStream();
  const int64_t half = options.config->head_dim / 2;
  const int64_t positions = options.max_positions;
  step->cos_ = step->scratch_.Alloc("cos", DType::kF32, {positions, half});
  step->sin_ = step->scratch_.Alloc("sin", DType::kF32, {positions, half});
  std::vector<float> cos(positions * half), sin(positions * half);
  RopeTables(*options.config, positions, cos.data(), sin.data());
  device.CopyFromHost(*step->stream_, cos.data(), step->cos_);
  device.CopyFromHost(*step->stream_, sin.data(), step->sin_);
  GW_RETURN_IF_ERROR(step->stream_->Finish());
  step->after_tables_ = step->scratch_.Mark();
  return step;
}

Tensor TrainStep::View(int unit, const Tensor& values, int64_t offset,
                       int64_t rows) const {
  const int64_t hidden = options_.config->hidden;
  const int64_t at = offset - options_.layout->unit(unit).begin;
  Tensor view = values.Rows(at, at + rows * hidden);
  return rows == 1 ? view : view.Reshape({rows, hidden});
}

Tensor TrainStep::Squares(int64_t offset) const {
  if (options_.squares.is_null()) return Tensor();
  const int64_t vocab = options_.config->vocab;
  const int64_t blocks = SquareBlocks(options_.config->hidden);
  const int64_t at = options_.table->SquaresOffset(offset);
  return options_.squares.Rows(at, at + vocab * blocks)
      .Reshape({vocab, blocks});
}

void TrainStep::VisitForward(
    const std::function<void(const Held& weights)>& visit) {
  UnitWeights& weights = *options_.weights;
  for (int unit = 0; unit <= last_unit(); ++unit) {
    const AcquiredUnit held(weights, *stream_, unit);
    std::optional<AcquiredUnit> head;
    if (unit == last_unit() && tied()) head.emplace(weights, *stream_, 0);
    if (unit < last_unit()) weights.Prefetch(*stream_, unit + 1);
    visit({unit, held.values(), head ? head->values() : held.values()});
  }
}

void TrainStep::VisitBackward(
    bool accumulate, const std::vector<int32_t>& ids,
    const std::function<void(const Held& weights, const HeldGradient& grad)>&
        visit) {
  UnitWeights& weights = *options_.weights;
  UnitGradients& gradients = *options_.gradients;
  EmbeddingRows* const rows = options_.embedding_rows;
  if (rows != nullptr) rows->Announce(ids);
  gradients.Start(accumulate);
  const auto begin = [&](int unit) {
    const UnitGradients::Place place = gradients.Begin(*stream_, unit);
    if (!place.accumulate) ClearSums(unit, place.values);
    return place;
  };
  const int64_t head_begin =
      options_.table->head() - options_.layout->unit(head_unit()).begin;
  const int64_t head_end =
      head_begin + options_.config->vocab * options_.config->hidden;
  const auto send_head = [&](const ReducedGradients::MakePart& make) {
    rows->gradients().EndPart(*stream_, head_unit(), head_begin, head_end,
                              make);
  };
  bool by_rows = false;
  // Of a tied head, whose gradient the embedding's is added to.
  UnitGradients::Place first;
  if (tied()) first = begin(0);
  for (int unit = last_unit(); unit > 0; --unit) {
    const AcquiredUnit held(weights, *stream_, unit);
    std::optional<AcquiredUnit> head;
    if (unit == last_unit() && tied()) head.emplace(weights, *stream_, 0);
    if (unit > 1) weights.Prefetch(*stream_, unit - 1);
    const UnitGradients::Place place = begin(unit);
    HeldGradient grad = {place, head ? first : place};
    // A tied table's gradient is no more than the head's if the embedding's is
    // added to the shards.
    bool head_ends = false;
    if (unit == last_unit() && rows != nullptr) {
      by_rows = rows->Await(*stream_);
      head_ends = by_rows || !tied();
      if (head_ends && head_rows_ > 0) grad.send_head = send_head;
    }
    visit({unit, held.values(), head ? head->values() : held.values()}, grad);
    if (grad.send_head != nullptr) {
      // What the visit has left, in the order of ranks that left nothing.
      send_head(nullptr);
      rows->gradients().EndPart(*stream_, head_unit(), 0,
                                options_.layout->unit(head_unit()).size(),
                                nullptr);
    } else if (head_ends) {
      gradients.End(*stream_, head_unit());
    }
    if (!head_ends || tied()) gradients.End(*stream_, unit);
  }
  if (by_rows) {
    visit({}, {});
  } else {
    if (!tied()) first = begin(0);
    visit({}, {first, first});
    gradients.End(*stream_, 0);
  }
  gradients.Finish(*stream_);
}

StoredActivations TrainStep::LayOut(char* memory, const PackedInputs& inputs,
                                    int64_t full_layers,
                                    int64_t head_bytes) const {
  const ModelConfig& config = *options_.config;
  const DType act = ActType(options_.precision);
  const int64_t rows = inputs.num_rows();
  auto alloc = [&](DType dtype, std::initializer_list<int64_t> shape) {
    Tensor tensor(memory, dtype, shape);
    memory += Arena::AlignedBytes(dtype, shape);
    return tensor;
  };
  StoredActivations stored;
  stored.full_layers = full_layers;
  stored.layers.resize(config.layers);
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    stored.layers[layer].input = alloc(act, {rows, config.hidden});
    if (layer < full_layers) {
      LayOutRest(config, act, inputs, alloc, stored.layers[layer]);
    }
  }
  stored.residual = alloc(act, {rows, config.hidden});
  stored.lse = alloc(DType::kF32, {rows});
  if (head_bytes > 0) stored.head = alloc(DType::kF32, {head_bytes / 4});
  return stored;
}

TrainStep::Bound TrainStep::Bind(const PackedInputs& inputs, int64_t top_k) {
  const ModelConfig& config = *options_.config;
  const DType act = ActType(options_.precision);
  const int64_t tokens = inputs.num_tokens(), rows = inputs.num_rows();
  GW_CHECK(tokens <= options_.max_tokens && inputs.k <= kMaxTargets &&
           top_k <= kMaxTargets);
  scratch_.ResetTo(after_tables_);
  auto alloc = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return scratch_.Alloc("scratch", dtype, shape);
  };
  Bound bound;
  bound.tokens = alloc(DType::kI32, {rows});
  bound.targets = alloc(DType::kI32, {rows, inputs.k});
  bound.context.positions = alloc(DType::kI32, {rows});
  bound.context.config = &config;
  bound.context.cos = cos_;
  bound.context.sin = sin_;
  bound.context.layout = {inputs.cu_seqlens.data(),
                          static_cast<int64_t>(inputs.cu_seqlens.size()) - 1};
  bound.scratch.normed = alloc(act, {rows, config.hidden});
  bound.scratch.hidden = alloc(act, {rows, config.hidden});
  bound.scratch.rotated = alloc(act, {rows, config.QkvWidth()});
  bound.scratch.d_rotated = alloc(act, {rows, config.QkvWidth()});
  bound.scratch.d_attention = alloc(act, {rows, config.AttentionWidth()});
  bound.scratch.ffn = alloc(act, {rows, config.ffn});
  bound.scratch.d_ffn = alloc(act, {rows, config.ffn});
  if (inputs.shares_rows()) {
    bound.context.row_of = alloc(DType::kI32, {tokens});
    bound.context.token_of = alloc(DType::kI32, {rows});
    bound.scratch.token_rotated = alloc(act, {tokens, config.QkvWidth()});
    bound.scratch.token_d_rotated = alloc(act, {tokens, config.QkvWidth()});
    bound.scratch.token_attention =
        alloc(act, {tokens, config.AttentionWidth()});
    bound.scratch.token_d_attention =
        alloc(act, {tokens, config.AttentionWidth()});
    device_.CopyFromHost(*stream_, inputs.row_of.data(), bound.context.row_of);
    device_.CopyFromHost(*stream_, inputs.token_of.data(),
                         bound.context.token_of);
  }
  LayOutRest(config, act, inputs, alloc, bound.spare);
  bound.residual_a = alloc(act, {rows, config.hidden});
  bound.residual_b = alloc(act, {rows, config.hidden});
  bound.lse = alloc(DType::kF32, {rows});
  bound.rstd = alloc(DType::kF32, {rows});
  bound.d_residual = alloc(act, {rows, config.hidden});
  bound.logprobs = alloc(DType::kF32, {rows, inputs.k});
  bound.d_logprobs = alloc(DType::kF32, {rows, inputs.k});
  if (top_k > 0) {
    bound.top_k_logprobs = alloc(DType::kF32, {rows, top_k});
    bound.top_k_indices = alloc(DType::kI32, {rows, top_k});
  }
  const int64_t attention =
      kernels_.AttentionWorkspaceBytes(ShapeOf(config), act, tokens);
  if (attention > 0) {
    bound.scratch.attention_workspace =
        alloc(DType::kF32, {(attention + 3) / 4});
  }
  const int64_t head = kernels_.LogprobHeadWorkspaceBytes(
      act, rows, config.hidden, config.vocab);
  if (head > 0) bound.head_workspace = alloc(DType::kF32, {(head + 3) / 4});
  device_.CopyFromHost(*stream_, inputs.tokens.data(), bound.tokens);
  device_.CopyFromHost(*stream_, inputs.targets.data(), bound.targets);
  device_.CopyFromHost(*stream_, inputs.positions.data(),
                       bound.context.positions);
  return bound;
}

absl::StatusOr<HeadResults> TrainStep::Forward(const PackedInputs& inputs,
                                               int64_t top_k,
                                               StoredActivations* stored) {
  const ModelConfig& config = *options_.config;
  const ParamTable& table = *options_.table;
  Bound bound = Bind(inputs, top_k);
  Stream& stream = *stream_;
  // Without a store the residual stream alternates between two buffers.
  auto input_of = [&](int64_t layer) {
    if (stored == nullptr) {
      return layer % 2 == 0 ? bound.residual_a : bound.residual_b;
    }
    return layer == config.layers ? stored->residual
                                  : stored->layers[layer].input;
  };
  VisitForward([&](const Held& weights) {
    if (weights.unit == 0) {
      kernels_.EmbeddingForward(
          stream, bound.tokens,
          View(0, weights.values, table.embedding(), config.vocab),
          input_of(0));
      return;
    }
    if (weights.unit == last_unit()) {
      kernels_.RmsNormForward(
          stream, input_of(config.layers),
          View(weights.unit, weights.values, table.final_norm(), 1),
          static_cast<float>(config.rms_eps), bound.scratch.normed, bound.rstd);
      LogprobHead head;
      head.hidden = bound.scratch.normed;
      head.weight = HeadView(weights.head);
      head.targets = bound.targets;
      LogprobHeadOutput out;
      out.logprobs = bound.logprobs;
      out.lse = stored == nullptr ? bound.lse : stored->lse;
      if (stored != nullptr) out.kept = stored->head;
      out.top_k_logprobs = bound.top_k_logprobs;
      out.top_k_indices = bound.top_k_indices;
      kernels_.LogprobHeadForward(stream, head, out, bound.head_workspace);
      return;
    }
    const int64_t layer = weights.unit - 1;
    BlockActivations acts = bound.spare;
    if (stored != nullptr && layer < stored->full_layers) {
      acts = stored->layers[layer];
    }
    acts.input = input_of(layer);
    stream.Section([&] {
      BlockForward(stream, kernels_, bound.context,
                   BlockParamsAt(config, table.blocks()[layer], weights.values,
                                 options_.layout->unit(weights.unit).begin),
                   acts, bound.scratch, input_of(layer + 1));
    });
  });
  HeadResults results;
  results.logprobs.resize(bound.logprobs.num_elements());
  device_.CopyToHost(stream, bound.logprobs, results.logprobs.data());
  if (top_k > 0) {
    results.top_k_logprobs.resize(bound.top_k_logprobs.num_elements());
    results.top_k_indices.resize(bound.top_k_indices.num_elements());
    device_.CopyToHost(stream, bound.top_k_logprobs,
                       results.top_k_logprobs.data());
    device_.CopyToHost(stream, bound.top_k_indices,
                       results.top_k_indices.data());
  }
  GW_RETURN_IF_ERROR(stream.Finish());
  results.logprobs = inputs.OfTokens(std::move(results.logprobs), inputs.k);
  results.top_k_logprobs =
      inputs.OfTokens(std::move(results.top_k_logprobs), top_k);
  results.top_k_indices =
      inputs.OfTokens(std::move(results.top_k_indices), top_k);
  return results;
}

void TrainStep::ClearSums(int unit, const Tensor& values) {
  const ParamTable& table = *options_.table;
  const ShardUnit& u = options_.layout->unit(unit);
  int64_t end = u.begin;  // of the parameter before
  const auto clear_gap = [&](int64_t next) {
    device_.Zero(*stream_, values.Rows(end - u.begin, next - u.begin));
  };
  for (const ParamRow& row : table.rows()) {
    if (row.offset < u.begin || row.offset >= u.end) continue;
    clear_gap(row.offset);
    end = row.offset + row.num_elements;
    // The embedding's gradient is added to the head's if they are one.
    const bool summed =
        row.shape.size() == 1 || (row.offset == table.embedding() && !tied());
    if (!summed) continue;
    const int64_t at = row.offset - u.begin;
    device_.Zero(*stream_, values.Rows(at, at + row.num_elements));
    if (options_.squares.is_null()) continue;
    device_.Zero(*stream_,
                 options_.squares.Rows(row.squares_offset,
                                       row.squares_offset + row.num_squares));
  }
  clear_gap(u.end);
}

absl::Status TrainStep::Backward(const PackedInputs& inputs,
                                 const StoredActivations& stored,
                                 const std::vector<float>& d_logprobs,
                                 bool accumulate) {
  const ModelConfig& config = *options_.config;
  const ParamTable& table = *options_.table;
  Bound bound = Bind(inputs, 0);
  Stream& stream = *stream_;
  const auto visit = [&](const Held& weights, const HeldGradient& grad) {
    const int unit = weights.unit;
    if (unit == last_unit()) {
      const Tensor norm = View(unit, weights.values, table.final_norm(), 1);
      kernels_.RmsNormForward(stream, stored.residual, norm,
                              static_cast<float>(config.rms_eps),
                              bound.scratch.normed, bound.rstd);
      HeadBackward(inputs, stored, d_logprobs, weights, grad, bound);
      device_.Zero(stream, bound.d_residual);
      kernels_.RmsNormBackward(
          stream, {bound.scratch.hidden, stored.residual, norm, bound.rstd},
          bound.d_residual,
          View(unit, grad.values.values, table.final_norm(), 1));
      return;
    }
    if (unit == 0) {
      for (int64_t t = 0; t < inputs.num_rows(); ++t) {
        if (inputs.tokens[t] == config.padding_token) {
          device_.Zero(stream, bound.d_residual.Rows(t, t + 1));
        }
      }
      if (grad.values.values.is_null()) {
        options_.embedding_rows->Add(stream, bound.d_residual, accumulate);
        return;
      }
      kernels_.EmbeddingBackward(
          stream, bound.tokens, bound.d_residual,
          View(0, grad.values.values, table.embedding(), config.vocab),
          Squares(table.embedding()));
      return;
    }
    const int64_t layer = unit - 1;
    const int64_t begin = options_.layout->unit(unit).begin;
    const BlockOffsets& at = table.blocks()[layer];
    const BlockParams params = BlockParamsAt(config, at, weights.values, begin);
    BlockActivations acts = stored.layers[layer];
    stream.Section([&] {
      if (layer >= stored.full_layers) {
        acts = bound.spare;
        acts.input = stored.layers[layer].input;
        BlockForward(stream, kernels_, bound.context, params, acts,
                     bound.scratch, bound.residual_a);
      }
      BlockBackward(stream, kernels_, bound.context, params, acts,
                    bound.scratch,
                    {BlockParamsAt(config, at, grad.values.values, begin),
                     BlockSquaresAt(config, table, at, options_.squares),
                     bound.d_residual, grad.values.accumulate});
    });
  };
  VisitBackward(accumulate, inputs.tokens, visit);
  return stream.Finish();
}

absl::Status TrainStep::JoinForward() {
  VisitForward([](const Held&) {});
  return stream_->Finish();
}

absl::Status TrainStep::JoinBackward(bool accumulate) {
  const auto visit = [&](const Held& weights, const HeldGradient& grad) {
    if (grad.values.values.is_null()) {
      options_.embedding_rows->Add(*stream_, Tensor(), accumulate);
      return;
    }
    if (grad.values.accumulate) return;
    device_.Zero(*stream_, grad.values.values);
    // On its way before the embedding is visited.
    if (weights.unit == last_unit()) {
      device_.Zero(*stream_, grad.head.values);
    }
  };
  VisitBackward(accumulate, {}, visit);
  return stream_->Finish();
}

}  // namespace gradwire
