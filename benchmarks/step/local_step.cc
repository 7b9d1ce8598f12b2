// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/step/local_step.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <utility>

#include "absl/flags/flag.h"
#include "base/status.h"
#include "trainer/memory_plan.h"
#include "trainer/train_step.h"

ABSL_FLAG(std::string, model, "", "a Hugging Face directory");
ABSL_FLAG(std::string, precision, "f32", "f32 or bf16");
ABSL_FLAG(int, threads, 0, "threads; 0: one for each core");
ABSL_FLAG(int64_t, sequences, 8, "sequences in the batch");
ABSL_FLAG(int64_t, length, 256, "tokens of a sequence");
ABSL_FLAG(bool, ragged, false,
          "lengths from a log-normal distribution, from 64, or an eighth of "
          "--length, to --length, with as many tokens in all");
ABSL_FLAG(std::string, moments, "f32", "of AdamW: f32 or bf16");
ABSL_FLAG(int64_t, micro_batch, 0, "tokens of a micro-batch; 0: the planner's");
ABSL_FLAG(int64_t, max_context, 0, "longest sequence; 0: the planner's");
ABSL_FLAG(int64_t, retained_tokens, 0,
          "tokens to keep activations of; 0: the planner's");
ABSL_FLAG(int64_t, shared, 0, "first tokens that all sequences share");
ABSL_FLAG(int64_t, prompt, 0, "first positions without a gradient");

namespace gradwire {
namespace {

// Of the batch's sequences.
std::vector<size_t> Lengths() {
  const auto sequences = static_cast<size_t>(absl::GetFlag(FLAGS_sequences));
  const auto most = static_cast<size_t>(absl::GetFlag(FLAGS_length));
  if (!absl::GetFlag(FLAGS_ragged)) {
    return std::vector<size_t>(sequences, most);
  }
  const double least = std::clamp(static_cast<double>(most) / 8, 1.0, 64.0);
  std::mt19937 random(2);
  // Two standard deviations each way.
  std::lognormal_distribution<double> drawn(
      0.5 * std::log(least * static_cast<double>(most)),
      std::max(1e-3, 0.25 * std::log(static_cast<double>(most) / least)));
  std::vector<size_t> lengths;
  for (size_t left = sequences * most; left > 0;) {
    const double n =
        std::clamp(drawn(random), least, static_cast<double>(most));
    lengths.push_back(std::min(left, static_cast<size_t>(n)));
    left -= lengths.back();
  }
  return lengths;
}

std::vector<TrainDatum> RandomBatch(int64_t vocab) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int32_t> id(0, static_cast<int32_t>(vocab) - 1);
  std::vector<TrainDatum> batch;
  for (const size_t n : Lengths()) {
    TrainDatum& datum = batch.emplace_back();
    for (size_t t = 0; t < n; ++t) {
      datum.tokens.push_back(id(random));
      datum.targets.push_back(id(random));
    }
    datum.weights.assign(n, 1.0f);
    const auto shared =
        std::min(n, static_cast<size_t>(absl::GetFlag(FLAGS_shared)));
    std::copy_n(batch.front().tokens.begin(), shared, datum.tokens.begin());
    std::copy_n(batch.front().targets.begin(), shared, datum.targets.begin());
    const auto prompt =
        std::min(n, static_cast<size_t>(absl::GetFlag(FLAGS_prompt)));
    std::fill_n(datum.weights.begin(), prompt, 0.0f);
  }
  return batch;
}

// Of one micro-batch of --retained_tokens, all layers in full and the head's
// exponentials; 0: the planner chooses.
absl::StatusOr<int64_t> ActivationBytesOfFlags(const TrainerOptions& options,
                                               const Kernels& kernels) {
  const int64_t tokens = absl::GetFlag(FLAGS_retained_tokens);
  if (tokens == 0) return 0;
  std::ifstream file(options.model_directory + "/config.json");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  GW_ASSIGN_OR_RETURN(const ModelConfig config, ParseModelConfig(text));
  return ActivationBytesOf(config, options.precision, tokens, tokens)
             .Kept(config.layers, config.layers) +
         HeadKeptBytes(kernels, config, options.precision, tokens, 1);
}

double SumOf(const std::vector<std::vector<float>>& logprobs) {
  double sum = 0;
  for (const std::vector<float>& datum : logprobs) {
    for (const float logprob : datum) sum += double{logprob};
  }
  return sum;
}

}  // namespace

std::unique_ptr<CpuDevice> LocalStep::NewDevice() {
  return std::make_unique<CpuDevice>(absl::GetFlag(FLAGS_threads));
}

DType LocalStep::Act() {
  return absl::GetFlag(FLAGS_precision) == "bf16" ? DType::kBF16 : DType::kF32;
}

std::string LocalStep::Model() {
  const std::filesystem::path path(absl::GetFlag(FLAGS_model));
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

absl::StatusOr<LocalStep> LocalStep::Create(Device& device, Kernels& kernels) {
  const std::string precision = absl::GetFlag(FLAGS_precision);
  if (precision != "f32" && precision != "bf16") {
    return absl::InvalidArgumentError("--precision must be f32 or bf16");
  }
  const std::string moments = absl::GetFlag(FLAGS_moments);
  if (moments != "f32" && moments != "bf16") {
    return absl::InvalidArgumentError("--moments must be f32 or bf16");
  }
  TrainerOptions options;
  options.model_directory = absl::GetFlag(FLAGS_model);
  options.precision =
      Act() == DType::kBF16 ? Precision::kBF16 : Precision::kF32;
  options.moment_precision =
      moments == "bf16" ? Precision::kBF16 : Precision::kF32;
  options.micro_batch_tokens = absl::GetFlag(FLAGS_micro_batch);
  options.max_context = absl::GetFlag(FLAGS_max_context);
  GW_ASSIGN_OR_RETURN(options.activation_bytes,
                      ActivationBytesOfFlags(options, kernels));
  GW_ASSIGN_OR_RETURN(
      std::unique_ptr<Trainer> trainer,
      Trainer::Create(
          options, device, kernels, [](const MemoryPlan&) {}, [](double) {}));
  return LocalStep(std::move(trainer));
}

LocalStep::LocalStep(std::unique_ptr<Trainer> trainer)
    : trainer_(std::move(trainer)),
      batch_(RandomBatch(trainer_->config().vocab)) {}

absl::StatusOr<std::vector<std::vector<float>>> LocalStep::Forward(
    const ForwardOptions& options) {
  std::vector<std::vector<float>> logprobs(batch_.size());
  GW_ASSIGN_OR_RETURN(
      const ForwardOutcome outcome,
      trainer_->Forward(batch_, options, [&](DatumLogprobs datum) {
        logprobs[static_cast<size_t>(datum.index)] = std::move(datum.logprobs);
      }));
  if (!options.activation_id.empty() && !outcome.retained) {
    return absl::InternalError(
        "activations were not kept: raise --retained_tokens");
  }
  return logprobs;
}

absl::StatusOr<double> LocalStep::ForwardBackward() {
  ForwardOptions options;
  options.backward = true;
  GW_ASSIGN_OR_RETURN(const auto logprobs, Forward(options));
  return SumOf(logprobs);
}

absl::StatusOr<double> LocalStep::CustomStep() {
  ForwardOptions options;
  options.activation_id = "custom";
  GW_ASSIGN_OR_RETURN(const auto logprobs, Forward(options));
  // Cross entropy again, so that both ways have the same gradient.
  std::vector<std::vector<float>> d_logprobs;
  for (const TrainDatum& datum : batch_) {
    d_logprobs.push_back(datum.weights);
    for (float& weight : d_logprobs.back()) weight = -weight;
  }
  GW_ASSIGN_OR_RETURN(const BackwardOutcome outcome,
                      trainer_->Backward(options.activation_id, d_logprobs,
                                         /*allow_stale=*/false));
  if (outcome.recomputed) {
    return absl::InternalError("the forward was computed again");
  }
  return SumOf(logprobs);
}

absl::StatusOr<double> LocalStep::TwoForwardStep() {
  GW_RETURN_IF_ERROR(Forward(ForwardOptions()).status());
  return ForwardBackward();
}

absl::Status LocalStep::OptimStep() {
  return trainer_->OptimStep(OptimParams()).status();
}

double LocalStep::UsefulFlops() const {
  const ModelConfig& c = trainer_->config();
  const double layer = static_cast<double>(
      c.hidden * (c.QkvWidth() + c.AttentionWidth() + 3 * c.ffn));
  const double layers = static_cast<double>(c.layers);
  const double weights =
      layers * layer + static_cast<double>(c.hidden * c.vocab);
  double squares = 0;  // of the lengths
  for (const TrainDatum& datum : batch_) {
    squares += std::pow(static_cast<double>(datum.tokens.size()), 2);
  }
  const double attention =
      2 * layers * static_cast<double>(c.AttentionWidth()) * squares;
  return 3 * (2 * weights * static_cast<double>(tokens()) + attention);
}

int64_t LocalStep::tokens() const {
  int64_t tokens = 0;
  for (const TrainDatum& datum : batch_) tokens += std::ssize(datum.tokens);
  return tokens;
}

int64_t LocalStep::HeadBytes(const Kernels& kernels) const {
  return HeadKeptBytes(
      kernels, trainer_->config(),
      Act() == DType::kBF16 ? Precision::kBF16 : Precision::kF32,
      absl::GetFlag(FLAGS_retained_tokens), 1);
}

int64_t LocalStep::length() const { return absl::GetFlag(FLAGS_length); }

}  // namespace gradwire
