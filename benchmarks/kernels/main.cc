// SPDX-License-Identifier: Apache-2.0
// Times every op on a model's own shapes: one JSON line each, with its share of
// the ceiling measured in the same run, then the forward and backward time that
// the ops add up to.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "benchmarks/kernels/ceilings.h"
#include "benchmarks/kernels/json_line.h"
#include "benchmarks/kernels/step_ops.h"
#include "benchmarks/kernels/timing.h"
#include "device/cpu_device.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nlohmann/json.hpp"

ABSL_FLAG(std::string, dtype, "both", "f32, bf16 or both");
ABSL_FLAG(int, threads, 0, "threads; 0: one for each core");
ABSL_FLAG(int, rounds, 5, "timed rounds of each op");
ABSL_FLAG(int64_t, sequences, 4, "sequences in the batch");
ABSL_FLAG(int64_t, length, 512, "tokens of a sequence");
ABSL_FLAG(std::string, commit, "", "commit of the build, for the record");
ABSL_FLAG(std::string, only, "", "run only ops whose name contains this");

namespace gradwire {
namespace {

constexpr double kRoundSeconds = 0.03;

void RunAll(DType act) {
  CpuDevice device(absl::GetFlag(FLAGS_threads));
  const std::unique_ptr<Kernels> kernels = NewCpuKernels();
  const StepShape shape = {
      .model = "SmolLM2-135M",
      .layers = 30,
      .hidden = 576,
      .heads = 9,
      .kv_heads = 3,
      .head_dim = 64,
      .ffn = 1536,
      .vocab = 49152,
      .sequences = absl::GetFlag(FLAGS_sequences),
      .length = absl::GetFlag(FLAGS_length),
  };
  const Ceilings ceilings = MeasureCeilings(device, *kernels, act);
  const RunInfo run = {
      .bench = "kernels",
      .commit = absl::GetFlag(FLAGS_commit),
      .device = kernels->description(),
      .threads = device.pool().num_threads(),
      .model = shape.model,
      .act = act,
      .length = shape.length,
      .tokens = shape.tokens(),
      .rounds = absl::GetFlag(FLAGS_rounds),
      .ceilings = ceilings,
  };
  nlohmann::ordered_json top = NewLine(run, "ceilings");
  top["gflops"] = ceilings.gemm_flops * 1e-9;
  top["gbps"] = ceilings.triad_bytes * 1e-9;
  PrintLine(top);

  const StepOps step(device, *kernels, shape, act);
  double seconds = 0, best_seconds = 0, worst_seconds = 0, flops = 0;
  for (const StepOp& op : step.ops()) {
    if (op.name.find(absl::GetFlag(FLAGS_only)) == std::string::npos) continue;
    const Timing t = Time(op.run, absl::GetFlag(FLAGS_rounds), kRoundSeconds);
    seconds += t.median * static_cast<double>(op.count);
    best_seconds += t.min * static_cast<double>(op.count);
    worst_seconds += t.max * static_cast<double>(op.count);
    flops += op.work.flops * static_cast<double>(op.count);
    nlohmann::ordered_json json = NewLine(run, op.name);
    json["count"] = op.count;
    json["ms"] = {t.median * 1e3, t.min * 1e3, t.max * 1e3};
    json["step_ms"] = t.median * 1e3 * static_cast<double>(op.count);
    json["gflops"] = op.work.flops / t.median * 1e-9;
    json["gbps"] = op.work.bytes / t.median * 1e-9;
    json["share_of_ceiling"] =
        op.work.flops > 0 ? op.work.flops / t.median / ceilings.gemm_flops
                          : op.work.bytes / t.median / ceilings.triad_bytes;
    PrintLine(json);
  }
  nlohmann::ordered_json sum = NewLine(run, "forward_backward_sum");
  sum["ms"] = {seconds * 1e3, best_seconds * 1e3, worst_seconds * 1e3};
  sum["tok_s"] = static_cast<double>(shape.tokens()) / seconds;
  sum["gflops"] = flops / seconds * 1e-9;
  sum["mcu"] = sum["share_of_ceiling"] = flops / seconds / ceilings.gemm_flops;
  PrintLine(sum);
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("times every op on a model's own shapes");
  absl::ParseCommandLine(argc, argv);
  const std::string dtype = absl::GetFlag(FLAGS_dtype);
  if (dtype != "f32" && dtype != "bf16" && dtype != "both") {
    std::fprintf(stderr, "--dtype must be f32, bf16 or both\n");
    return 2;
  }
  if (dtype != "bf16") gradwire::RunAll(gradwire::DType::kF32);
  if (dtype != "f32") gradwire::RunAll(gradwire::DType::kBF16);
  return 0;
}
