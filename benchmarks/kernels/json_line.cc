// SPDX-License-Identifier: Apache-2.0
#include "benchmarks/kernels/json_line.h"

#include <cstdio>

namespace gradwire {

nlohmann::ordered_json NewLine(const RunInfo& run, const std::string& op) {
  nlohmann::ordered_json line;
  for (const char* field :
       {"bench",     "op",           "commit",      "device",
        "threads",   "driver",       "model",       "mode",
        "dtype",     "optimizer",    "T",           "tokens",
        "packing",   "microbatch",   "recompute",   "rounds",
        "ms",        "tok_s",        "mfu_c",       "mcu",
        "hfu",       "gflops",       "gbps",        "share_of_ceiling",
        "count",     "step_ms",      "peak_mem",    "ceil_gemm",
        "ceil_copy", "clock_before", "clock_after", "baseline",
        "ratio",     "dloss",        "grad_cos"}) {
    line[field] = nullptr;
  }
  line["bench"] = run.bench;
  line["op"] = op;
  if (!run.commit.empty()) line["commit"] = run.commit;
  line["device"] = run.device;
  line["threads"] = run.threads;
  line["model"] = run.model;
  line["dtype"] = DTypeName(run.act);
  line["T"] = run.length;
  line["tokens"] = run.tokens;
  line["rounds"] = run.rounds;
  line["ceil_gemm"] = run.ceilings.gemm_flops;
  line["ceil_copy"] = run.ceilings.triad_bytes;
  return line;
}

void PrintLine(const nlohmann::ordered_json& line) {
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
}

}  // namespace gradwire
