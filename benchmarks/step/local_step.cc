// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/step/local_step.h"

#include <algorithm>
#include <random>
#include <string>
#include <utility>

#include "absl/flags/flag.h"
#include "base/status.h"

ABSL_FLAG(std::string, model, "", "a Hugging Face directory");
ABSL_FLAG(std::string, precision, "f32", "f32 or bf16");
ABSL_FLAG(int, threads, 0, "threads; 0: one for each core");
ABSL_FLAG(int64_t, sequences, 8, "sequences in the batch");
ABSL_FLAG(int64_t, length, 256, "tokens of a sequence");
ABSL_FLAG(int64_t, shared, 0, "first tokens that all sequences share");
ABSL_FLAG(int64_t, prompt, 0, "first positions without a gradient");

namespace gradwire {
namespace {

std::vector<TrainDatum> RandomBatch(int64_t vocab) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int32_t> id(0, static_cast<int32_t>(vocab) - 1);
  std::vector<TrainDatum> batch(
      static_cast<size_t>(absl::GetFlag(FLAGS_sequences)));
  for (TrainDatum& datum : batch) {
    const auto n = static_cast<size_t>(absl::GetFlag(FLAGS_length));
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

}  // namespace

std::unique_ptr<CpuDevice> LocalStep::NewDevice() {
  return std::make_unique<CpuDevice>(absl::GetFlag(FLAGS_threads));
}

DType LocalStep::Act() {
  return absl::GetFlag(FLAGS_precision) == "bf16" ? DType::kBF16 : DType::kF32;
}

absl::StatusOr<LocalStep> LocalStep::Create(CpuDevice& device,
                                            Kernels& kernels) {
  const std::string precision = absl::GetFlag(FLAGS_precision);
  if (precision != "f32" && precision != "bf16") {
    return absl::InvalidArgumentError("--precision must be f32 or bf16");
  }
  TrainerOptions options;
  options.model_directory = absl::GetFlag(FLAGS_model);
  options.precision =
      Act() == DType::kBF16 ? Precision::kBF16 : Precision::kF32;
  GW_ASSIGN_OR_RETURN(
      std::unique_ptr<Trainer> trainer,
      Trainer::Create(
          options, device, kernels, [](const MemoryPlan&) {}, [](double) {}));
  return LocalStep(std::move(trainer));
}

LocalStep::LocalStep(std::unique_ptr<Trainer> trainer)
    : trainer_(std::move(trainer)),
      batch_(RandomBatch(trainer_->config().vocab)) {}

absl::StatusOr<double> LocalStep::ForwardBackward() {
  ForwardOptions options;
  options.backward = true;
  double sum = 0;
  GW_RETURN_IF_ERROR(trainer_
                         ->Forward(batch_, options,
                                   [&](const DatumLogprobs& datum) {
                                     for (const float logprob :
                                          datum.logprobs) {
                                       sum += double{logprob};
                                     }
                                   })
                         .status());
  return sum;
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
  const double attention =
      2 * layers * static_cast<double>(c.AttentionWidth()) *
      static_cast<double>(length()) * static_cast<double>(tokens());
  return 3 * (2 * weights * static_cast<double>(tokens()) + attention);
}

int64_t LocalStep::length() const { return absl::GetFlag(FLAGS_length); }

}  // namespace gradwire
