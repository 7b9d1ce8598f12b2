// SPDX-License-Identifier: Apache-2.0
// Profiles training steps (forward, backward, optimizer) by op: a JSON line for
// each and a table whose rows add up to the wall time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "benchmarks/kernels/ceilings.h"
#include "benchmarks/kernels/json_line.h"
#include "benchmarks/kernels/timing.h"
#include "benchmarks/profile/profiling_kernels.h"
#include "benchmarks/profile/step_profile.h"
#include "benchmarks/step/local_step.h"
#include "kernels/cpu/cpu_kernels.h"

ABSL_FLAG(int, steps, 5, "profiled steps, after two that warm up");
ABSL_FLAG(std::string, name, "", "the model's name, for the record");
ABSL_FLAG(std::string, commit, "", "commit of the build, for the record");

namespace gradwire {
namespace {

constexpr int kWarmSteps = 2;

nlohmann::ordered_json JsonRow(const RunInfo& run, const ProfileRow& row,
                               const StepProfile& profile) {
  std::vector<double> ms;
  for (const double seconds : row.step_seconds) ms.push_back(1e3 * seconds);
  std::sort(ms.begin(), ms.end());
  const double seconds = row.MeanSeconds();
  nlohmann::ordered_json line = NewLine(run, row.op);
  line["mode"] = "ft";
  line["optimizer"] = "adamw";
  line["ms"] = {ms[ms.size() / 2], ms.front(), ms.back()};
  line["step_ms"] = 1e3 * seconds;
  line["share_of_step"] = seconds / profile.step.MeanSeconds();
  if (row.calls > 0) line["count"] = row.calls;
  if (row.work.bytes > 0) {
    line["gflops"] = 1e-9 * row.work.flops / seconds;
    line["gbps"] = 1e-9 * row.work.bytes / seconds;
    line["share_of_ceiling"] = ShareOfCeiling(row, run.ceilings);
  }
  return line;
}

absl::Status Run() {
  const std::unique_ptr<CpuDevice> device = LocalStep::NewDevice();
  ProfilingKernels kernels(NewCpuKernels());
  RunInfo run;
  run.ceilings = MeasureCeilings(*device, kernels, LocalStep::Act());
  auto step = LocalStep::Create(*device, kernels);
  if (!step.ok()) return step.status();
  run.bench = "profile";
  run.commit = absl::GetFlag(FLAGS_commit);
  run.device = kernels.description();
  run.threads = device->pool().num_threads();
  run.model = absl::GetFlag(FLAGS_name);
  run.act = LocalStep::Act();
  run.length = step->length();
  run.tokens = step->tokens();
  run.rounds = std::max(1, absl::GetFlag(FLAGS_steps));

  std::vector<std::map<std::string, OpTotal>> totals;
  std::vector<double> wall;
  for (int i = -kWarmSteps; i < run.rounds; ++i) {
    kernels.TakeTotals();
    const double start = NowSeconds();
    const auto sum = step->ForwardBackward();
    if (!sum.ok()) return sum.status();
    if (auto status = step->OptimStep(); !status.ok()) return status;
    const double seconds = NowSeconds() - start;
    if (!std::isfinite(*sum)) return absl::InternalError("logprobs not finite");
    if (i < 0) continue;
    totals.push_back(kernels.TakeTotals());
    wall.push_back(seconds);
  }
  const Ceilings after = MeasureCeilings(*device, kernels, LocalStep::Act());
  run.ceilings = {std::max(run.ceilings.gemm_flops, after.gemm_flops),
                  std::max(run.ceilings.triad_bytes, after.triad_bytes)};
  const StepProfile profile = Summarize(totals, wall);
  for (const ProfileRow& row : profile.ops) {
    PrintLine(JsonRow(run, row, profile));
  }
  PrintLine(JsonRow(run, profile.outside, profile));
  const double seconds = profile.step.MeanSeconds();
  const double tok_s = static_cast<double>(run.tokens) / seconds;
  const double mcu = step->UsefulFlops() / seconds / run.ceilings.gemm_flops;
  nlohmann::ordered_json whole = JsonRow(run, profile.step, profile);
  whole["tok_s"] = tok_s;
  whole["mcu"] = mcu;
  PrintLine(whole);
  std::printf(
      "\n%s %s, %d threads, %s, %lld tokens; mean of %d steps\n"
      "best product %.0f GFLOP/s, triad %.1f GB/s\n"
      "%.0f tok/s, useful FLOPs at %.2f of the best product\n\n%s",
      run.model.c_str(), DTypeName(run.act), run.threads, run.device.c_str(),
      static_cast<long long>(run.tokens), run.rounds,
      1e-9 * run.ceilings.gemm_flops, 1e-9 * run.ceilings.triad_bytes, tok_s,
      mcu, profile.Table(run.ceilings).c_str());
  return absl::OkStatus();
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("profiles training steps by op");
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = gradwire::Run();
  if (!status.ok()) std::cerr << status << "\n";
  return status.ok() ? 0 : 1;
}
