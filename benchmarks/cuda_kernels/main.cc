// SPDX-License-Identifier: Apache-2.0
// Times the ops of kernels.h on a GPU with the GPU's own clock: one JSON line
// each, with its share of the copy's bandwidth measured in the same run.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "base/check.h"
#include "benchmarks/cuda_kernels/gpu_ops.h"
#include "benchmarks/kernels/timing.h"
#include "device/cuda/cuda_device.h"
#include "device/cuda/cuda_event.h"
#include "kernels/cuda/cuda_kernels.h"
#include "nlohmann/json.hpp"

ABSL_FLAG(std::string, dtype, "bf16", "f32, bf16 or both");
ABSL_FLAG(int, rounds, 15, "timed rounds of each op");
ABSL_FLAG(std::string, model, "Qwen3-1.7B",
          "its geometry: Qwen3-0.6B, -1.7B, -4B, -8B; or tiny, for tests");
ABSL_FLAG(int64_t, tokens, 4096, "tokens of a micro-batch");
ABSL_FLAG(int64_t, length, 0, "tokens of a sequence; 0: all of them");
ABSL_FLAG(std::string, commit, "", "commit of the build, for the record");
ABSL_FLAG(std::string, only, "", "run only ops whose name contains this");

namespace gradwire {
namespace {

// Of a round: what the clock can tell apart, and launches can be queued ahead.
constexpr int kCalls = 12;

const std::map<std::string, GpuShape>& Shapes() {
  static const auto* const shapes = new std::map<std::string, GpuShape>{
      {"Qwen3-0.6B", {.hidden = 1024, .ffn = 3072, .heads = 16}},
      {"Qwen3-1.7B", {.hidden = 2048, .ffn = 6144, .heads = 16}},
      {"Qwen3-4B", {.hidden = 2560, .ffn = 9728, .heads = 32}},
      {"Qwen3-8B", {.hidden = 4096, .ffn = 12288, .heads = 32}},
      {"tiny",
       {.hidden = 64,
        .ffn = 96,
        .heads = 4,
        .kv_heads = 2,
        .head_dim = 32,
        .vocab = 256}}};
  return *shapes;
}

Timing TimeOnDevice(CudaStream& stream,
                    const std::function<void(int call)>& run, int rounds) {
  int call = 0;
  for (; call < kCalls; ++call) run(call);
  std::vector<double> seconds;
  for (int round = 0; round < rounds && stream.ok(); ++round) {
    CudaEvent begin(true), end(true);
    stream.Check(begin.Record(stream.get()), "an event");
    for (int i = 0; i < kCalls; ++i) run(call++);
    stream.Check(end.Record(stream.get()), "an event");
    stream.Check(cudaStreamSynchronize(stream.get()), "an op");
    seconds.push_back(end.SecondsSince(begin) / kCalls);
  }
  std::sort(seconds.begin(), seconds.end());
  if (seconds.empty()) return {};
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

// Bytes read and written a second by the driver's own copy.
double CopyBandwidth(CudaDevice& device, CudaStream& stream) {
  constexpr int64_t kBytes = int64_t{512} << 20;
  auto from = device.Allocate(kBytes), to = device.Allocate(kBytes);
  if (!from.ok() || !to.ok()) {
    stream.Fail(from.ok() ? to.status() : from.status());
    return 0;
  }
  const Timing t = TimeOnDevice(
      stream,
      [&](int) {
        stream.Check(cudaMemcpyAsync((*to)->data(), (*from)->data(), kBytes,
                                     cudaMemcpyDeviceToDevice, stream.get()),
                     "a copy");
      },
      7);
  return t.median > 0 ? 2.0 * static_cast<double>(kBytes) / t.median : 0;
}

struct HostCopies {
  double pinned = 0;    // bytes a second of the driver's, to page-locked memory
  double pageable = 0;  // of CopyToHost, to memory that is not
};

// What a snapshot takes off the device with, and what the bus would give.
HostCopies CopiesToHost(CudaDevice& device, CudaStream& stream, int64_t bytes) {
  constexpr int kRounds = 5;
  HostCopies best;
  auto from = device.Allocate(bytes);
  void* pinned = nullptr;
  stream.Fail(from.status());
  stream.Check(
      cudaHostAlloc(&pinned, static_cast<size_t>(bytes), cudaHostAllocDefault),
      "page-locked memory");
  if (!stream.ok()) return best;
  const Tensor tensor((*from)->data(), DType::kF32, {bytes / 4});
  // Written, so that no copy waits for its pages.
  std::vector<char> host(static_cast<size_t>(bytes), 1);
  const auto rate = [&](const std::function<void()>& copy) {
    const double start = NowSeconds();
    copy();
    return static_cast<double>(bytes) / (NowSeconds() - start);
  };
  for (int round = 0; round < kRounds && stream.ok(); ++round) {
    best.pinned = std::max(
        best.pinned, rate([&] {
          stream.Check(
              cudaMemcpyAsync(pinned, tensor.raw(), static_cast<size_t>(bytes),
                              cudaMemcpyDeviceToHost, stream.get()),
              "a copy");
          stream.Check(cudaStreamSynchronize(stream.get()), "a copy");
        }));
    best.pageable =
        std::max(best.pageable,
                 rate([&] { device.CopyToHost(stream, tensor, host.data()); }));
  }
  cudaFreeHost(pinned);
  return best;
}

bool IsFinite(const Tensor& host) {
  for (int64_t i = 0; i < host.num_elements(); ++i) {
    const double value = host.dtype() == DType::kBF16
                             ? static_cast<float>(host.data<BFloat16>()[i])
                         : host.dtype() == DType::kF64 ? host.data<double>()[i]
                                                       : host.data<float>()[i];
    if (!std::isfinite(value)) return false;
  }
  return true;
}

// What an op gave, that it may not have been timed for nothing.
absl::Status CheckOutputs(CudaDevice& device, CudaStream& stream,
                          const GpuOp& op) {
  for (const Tensor& output : op.outputs) {
    std::vector<char> host(static_cast<size_t>(output.bytes()));
    device.CopyToHost(stream, output, host.data());
    if (absl::Status status = stream.Finish(); !status.ok()) return status;
    if (!IsFinite(
            Tensor(host.data(), output.dtype(), {output.num_elements()}))) {
      return absl::InternalError(op.name + " gave numbers that are not finite");
    }
  }
  return absl::OkStatus();
}

absl::Status RunAll(CudaDevice& device, Kernels& kernels, DType act) {
  const std::unique_ptr<Stream> owned = device.NewStream();
  auto& stream = static_cast<CudaStream&>(*owned);
  const double copy = CopyBandwidth(device, stream);
  const bool tiny = absl::GetFlag(FLAGS_model) == "tiny";
  GpuShape shape = Shapes().at(absl::GetFlag(FLAGS_model));
  shape.tokens = absl::GetFlag(FLAGS_tokens);
  shape.length = absl::GetFlag(FLAGS_length);
  if (shape.length == 0) shape.length = shape.tokens;
  const auto line = [&](const std::string& op) {
    nlohmann::ordered_json json;
    json["bench"] = "cuda_kernels";
    json["commit"] = absl::GetFlag(FLAGS_commit);
    json["device"] = kernels.description();
    json["model"] = absl::GetFlag(FLAGS_model);
    json["dtype"] = DTypeName(act);
    json["T"] = shape.length;
    json["tokens"] = shape.tokens;
    json["op"] = op;
    return json;
  };
  nlohmann::ordered_json top = line("copy");
  top["gbps"] = copy * 1e-9;
  std::printf("%s\n", top.dump().c_str());
  if (std::string("copy_to_host").find(absl::GetFlag(FLAGS_only)) !=
      std::string::npos) {
    const HostCopies copies =
        CopiesToHost(device, stream, int64_t{1} << (tiny ? 22 : 30));
    nlohmann::ordered_json json = line("copy_to_host");
    json["gbps"] = copies.pageable * 1e-9;
    json["pinned_gbps"] = copies.pinned * 1e-9;
    json["share_of_pinned"] = copies.pageable / copies.pinned;
    std::printf("%s\n", json.dump().c_str());
  }
  const GpuOps ops(device, kernels, stream, shape, act);
  for (const GpuOp& op : ops.ops()) {
    if (!stream.ok()) break;
    if (op.name.find(absl::GetFlag(FLAGS_only)) == std::string::npos) continue;
    const Timing t = TimeOnDevice(stream, op.run, absl::GetFlag(FLAGS_rounds));
    if (absl::Status status = CheckOutputs(device, stream, op); !status.ok()) {
      return status;
    }
    nlohmann::ordered_json json = line(op.name);
    json["us"] = {t.median * 1e6, t.min * 1e6, t.max * 1e6};
    json["gbps"] = op.work.bytes / t.median * 1e-9;
    json["share_of_copy"] = op.work.bytes / t.median / copy;
    if (op.work.flops > 0) json["tflops"] = op.work.flops / t.median * 1e-12;
    std::printf("%s\n", json.dump().c_str());
    std::fflush(stdout);
  }
  return owned->Finish();
}

int Main() {
  auto device = CudaDevice::Create(0);
  if (!device.ok()) {
    std::fprintf(stderr, "no GPU to measure: %s\n",
                 std::string(device.status().message()).c_str());
    return 1;
  }
  auto kernels = NewCudaKernels(**device);
  GW_CHECK(kernels.ok());
  const std::string dtype = absl::GetFlag(FLAGS_dtype);
  for (const DType act : {DType::kF32, DType::kBF16}) {
    if (dtype != "both" && dtype != DTypeName(act)) continue;
    const absl::Status status = RunAll(**device, **kernels, act);
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", status.ToString().c_str());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace gradwire

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("times every op on a GPU");
  absl::ParseCommandLine(argc, argv);
  const std::string dtype = absl::GetFlag(FLAGS_dtype);
  if (dtype != "f32" && dtype != "bf16" && dtype != "both") {
    std::fprintf(stderr, "--dtype must be f32, bf16 or both\n");
    return 2;
  }
  if (!gradwire::Shapes().contains(absl::GetFlag(FLAGS_model))) {
    std::string names;
    for (const auto& [name, shape] : gradwire::Shapes()) names += " " + name;
    std::fprintf(stderr, "--model must be one of%s\n", names.c_str());
    return 2;
  }
  const int64_t tokens = absl::GetFlag(FLAGS_tokens);
  const int64_t length = absl::GetFlag(FLAGS_length);
  if (tokens < 1 || length < 0 || (length > 0 && tokens % length != 0)) {
    std::fprintf(stderr, "--tokens must be a multiple of --length\n");
    return 2;
  }
  return gradwire::Main();
}
