// SPDX-License-Identifier: Apache-2.0
// Training steps of a GPU in a process of their own, without a server, for
// step.py to time beside PyTorch's. One command a line on stdin, one JSON line
// each on stdout:
//
//   describe             the model, the batch and the memory plan
//   batch PATH           writes int32 tokens [n], then int32 targets [n]
//   gradient PATH NAME.. of one ForwardBackward, float32, one after another
//   step                 forward, backward, AdamW
//   forward_backward     these begin with no gradient, which takes no part in
//   custom               their time: LocalStep's
//   double
//
// The last four answer with their seconds and the sum of their logprobs. All of
// them end when the GPU has done its work.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "base/status.h"
#include "benchmarks/kernels/timing.h"
#include "benchmarks/step/local_step.h"
#include "device/cuda/cuda_device.h"
#include "kernels/cuda/cuda_kernels.h"
#include "nlohmann/json.hpp"

namespace gradwire {
namespace {

using Json = nlohmann::ordered_json;

Json Describe(LocalStep& step, const Kernels& kernels) {
  const MemoryPlan& plan = step.trainer().plan();
  return {{"device", kernels.description()},
          {"parameters", step.trainer().num_parameters()},
          {"sequences", step.sequences()},
          {"length", step.length()},
          {"tokens", step.tokens()},
          {"useful_flops", step.UsefulFlops()},
          {"available_bytes", plan.available},
          {"micro_batch_tokens", plan.micro_batch_tokens},
          {"weight_bytes", plan.weights},
          {"gradient_bytes", plan.gradients},
          {"optimizer_bytes", plan.optimizer},
          {"activation_bytes", plan.activations},
          {"head_kept_bytes", step.HeadBytes(kernels)},
          {"workspace_bytes", plan.workspace}};
}

template <typename T>
void Append(std::ofstream& file, const std::vector<T>& values) {
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(T)));
}

absl::StatusOr<Json> Written(std::ofstream& file, const std::string& path) {
  file.close();
  if (!file) return absl::UnavailableError("cannot write " + path);
  return Json{{"path", path}};
}

absl::StatusOr<Json> WriteBatch(const LocalStep& step,
                                const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  for (const TrainDatum& datum : step.batch()) Append(file, datum.tokens);
  for (const TrainDatum& datum : step.batch()) Append(file, datum.targets);
  return Written(file, path);
}

absl::StatusOr<Json> WriteGradient(LocalStep& step, std::istream& arguments) {
  std::string path;
  arguments >> path;
  step.trainer().ZeroGrad();
  GW_RETURN_IF_ERROR(step.ForwardBackward().status());
  std::ofstream file(path, std::ios::binary);
  for (std::string name; arguments >> name;) {
    GW_ASSIGN_OR_RETURN(const std::vector<float> gradient,
                        step.trainer().Gradient(name));
    Append(file, gradient);
  }
  return Written(file, path);
}

absl::StatusOr<double> WholeStep(LocalStep& step) {
  GW_ASSIGN_OR_RETURN(const double sum, step.ForwardBackward());
  GW_RETURN_IF_ERROR(step.OptimStep());
  return sum;
}

absl::StatusOr<Json> Run(LocalStep& step, const Kernels& kernels,
                         const std::string& line) {
  std::istringstream arguments(line);
  std::string command;
  arguments >> command;
  if (command == "describe") return Describe(step, kernels);
  if (command == "gradient") return WriteGradient(step, arguments);
  if (command == "batch") {
    std::string path;
    arguments >> path;
    return WriteBatch(step, path);
  }
  const std::map<std::string, std::function<absl::StatusOr<double>()>> timed = {
      {"step", [&] { return WholeStep(step); }},
      {"forward_backward", [&] { return step.ForwardBackward(); }},
      {"custom", [&] { return step.CustomStep(); }},
      {"double", [&] { return step.TwoForwardStep(); }}};
  const auto found = timed.find(command);
  if (found == timed.end()) {
    return absl::InvalidArgumentError("no command '" + command + "'");
  }
  step.trainer().ZeroGrad();
  const double start = NowSeconds();
  GW_ASSIGN_OR_RETURN(const double sum, found->second());
  const double seconds = NowSeconds() - start;
  if (!std::isfinite(sum)) return absl::InternalError("logprobs not finite");
  return Json{{"seconds", seconds}, {"logprob_sum", sum}};
}

absl::Status Serve() {
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<CudaDevice> device,
                      CudaDevice::Create(0));
  GW_ASSIGN_OR_RETURN(const std::unique_ptr<Kernels> kernels,
                      NewCudaKernels(*device));
  GW_ASSIGN_OR_RETURN(LocalStep step, LocalStep::Create(*device, *kernels));
  for (std::string line; std::getline(std::cin, line);) {
    GW_ASSIGN_OR_RETURN(const Json answer, Run(step, *kernels, line));
    std::printf("%s\n", answer.dump().c_str());
    std::fflush(stdout);
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("training steps of a GPU, by commands on stdin");
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = gradwire::Serve();
  if (!status.ok()) std::cerr << status << "\n";
  return status.ok() ? 0 : 1;
}
