// SPDX-License-Identifier: Apache-2.0
// The trainer without a server around it: the step that `rpc.py` takes the cost
// of streaming from. For each line on stdin one forward and backward of the
// same random batch; answers with its seconds, and the sum of its logprobs.
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>

#include "absl/flags/parse.h"
#include "benchmarks/kernels/timing.h"
#include "benchmarks/step/local_step.h"
#include "kernels/cpu/cpu_kernels.h"

namespace gradwire {
namespace {

int Serve() {
  const std::unique_ptr<CpuDevice> device = LocalStep::NewDevice();
  const std::unique_ptr<Kernels> kernels = NewCpuKernels();
  absl::StatusOr<LocalStep> step = LocalStep::Create(*device, *kernels);
  if (!step.ok()) {
    std::cerr << step.status() << "\n";
    return 1;
  }
  for (std::string line; std::getline(std::cin, line);) {
    const double start = NowSeconds();
    const absl::StatusOr<double> sum = step->ForwardBackward();
    const double seconds = NowSeconds() - start;
    if (!sum.ok()) {
      std::cerr << sum.status() << "\n";
      return 1;
    }
    std::printf("%.9f %.9g\n", seconds, *sum);
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
