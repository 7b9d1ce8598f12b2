// SPDX-License-Identifier: Apache-2.0
// The trainer without a server around it: the step that `rpc.py` takes the cost
// of streaming from. For each line on stdin one forward and backward of the
// same random batch; answers with its seconds, and the sum of its logprobs.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "trainer/trainer.h"

ABSL_FLAG(std::string, model, "", "a Hugging Face directory");
ABSL_FLAG(std::string, precision, "f32", "f32 or bf16");
ABSL_FLAG(int, threads, 0, "threads; 0: one for each core");
ABSL_FLAG(int64_t, sequences, 8, "sequences in the batch");
ABSL_FLAG(int64_t, length, 256, "tokens of a sequence");

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
  }
  return batch;
}

int Serve() {
  CpuDevice device(absl::GetFlag(FLAGS_threads));
  const std::unique_ptr<Kernels> kernels = NewCpuKernels();
  TrainerOptions options;
  options.model_directory = absl::GetFlag(FLAGS_model);
  if (absl::GetFlag(FLAGS_precision) == "bf16") {
    options.precision = Precision::kBF16;
  }
  auto trainer = Trainer::Create(
      options, device, *kernels, [](const MemoryPlan&) {}, [](double) {});
  if (!trainer.ok()) {
    std::cerr << trainer.status() << "\n";
    return 1;
  }
  const std::vector<TrainDatum> batch = RandomBatch((*trainer)->config().vocab);
  ForwardOptions step;
  step.backward = true;
  for (std::string line; std::getline(std::cin, line);) {
    double sum = 0;
    const auto start = std::chrono::steady_clock::now();
    const auto outcome =
        (*trainer)->Forward(batch, step, [&](const DatumLogprobs& datum) {
          for (const float logprob : datum.logprobs) sum += double{logprob};
        });
    const std::chrono::duration<double> seconds =
        std::chrono::steady_clock::now() - start;
    if (!outcome.ok()) {
      std::cerr << outcome.status() << "\n";
      return 1;
    }
    std::printf("%.9f %.9g\n", seconds.count(), sum);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  return gradwire::Serve();
}
