// SPDX-License-Identifier: Apache-2.0
#include "server/rank_backend.h"

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "base/error.h"
#include "device/cpu_device.h"
#include "device/thread_pool.h"
#include "kernels/cpu/cpu_kernels.h"
#include "server/cuda_backend.h"
#include "sharding/gloo/gloo_collectives.h"
#include "sharding/replicated_collectives.h"

namespace gradwire {

std::string RankBackend::description() const {
  const ThreadPool* threads = device->host_threads();
  if (threads == nullptr) return kernels->description();
  return kernels->description() + ", " +
         std::to_string(threads->num_threads()) + " threads";
}

absl::StatusOr<RankBackend> MakeRankBackend(const std::string& device,
                                            int threads) {
  if (device == "cpu") {
    RankBackend backend;
    backend.device = std::make_unique<CpuDevice>(threads);
    backend.kernels = NewCpuKernels();
    backend.connect = NewGlooCollectives;
    backend.replicate = NewReplicatedCollectives;
    return backend;
  }
  absl::string_view index = device;
  int number = 0;
  if (absl::ConsumePrefix(&index, "cuda") &&
      (index.empty() || (absl::ConsumePrefix(&index, ":") &&
                         absl::SimpleAtoi(index, &number) && number >= 0))) {
    return MakeCudaBackend(number);
  }
  return ErrorBuilder(absl::StatusCode::kInvalidArgument, "DEVICE_UNKNOWN")
      .With("field", "device")
      .With("value", device)
      .Message("there is no device \"" + device +
               "\"; use cpu, cuda or cuda:N, with N the number of a GPU");
}

}  // namespace gradwire
