// SPDX-License-Identifier: Apache-2.0
#include "server/rank_memory.h"

#include <cstdlib>
#include <fstream>

namespace gradwire {

v1::MemoryPlan ToProto(const MemoryPlan& plan) {
  v1::MemoryPlan out;
  out.set_weights(plan.weights);
  out.set_gradients(plan.gradients);
  out.set_optimizer(plan.optimizer);
  out.set_activations(plan.activations);
  out.set_workspace(plan.workspace);
  out.set_total(plan.total);
  out.set_available(plan.available);
  out.set_micro_batch_tokens(plan.micro_batch_tokens);
  out.set_max_context_length(plan.max_context);
  out.set_retained_tokens(plan.retained_tokens);
  return out;
}

int64_t ProcessBytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(key + ":", 0) == 0) {
      return std::atoll(line.c_str() + key.size() + 1) * 1024;
    }
  }
  return 0;
}

v1::MemoryUse ToProto(const MemoryUse& use, int64_t other) {
  v1::MemoryUse out;
  out.set_weights(use.weights);
  out.set_gradients(use.gradients);
  out.set_optimizer(use.optimizer);
  out.set_activations(use.activations);
  out.set_workspace(use.workspace);
  out.set_other(other);
  out.set_total(use.weights + use.gradients + use.optimizer + use.activations +
                use.workspace + other);
  out.set_resident_peak(ProcessBytes("VmHWM"));
  return out;
}

}  // namespace gradwire
