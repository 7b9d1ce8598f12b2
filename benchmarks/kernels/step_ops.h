// SPDX-License-Identifier: Apache-2.0
// The ops of one forward and backward of a llama-family model, with their
// shapes, their counts and the work each must do.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "benchmarks/kernels/op_work.h"
#include "device/cpu_device.h"
#include "kernels/kernels.h"

namespace gradwire {

struct StepShape {
  std::string model;
  int64_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int64_t ffn = 0, vocab = 0;
  int64_t sequences = 0, length = 0;

  int64_t tokens() const { return sequences * length; }
};

struct StepOp {
  std::string name;
  int64_t count = 0;  // calls in a forward and backward; 0: not part of it
  Work work;          // of a call
  std::function<void(int call)> run;
};

// Owns the tensors the ops work on. Operands rotate over several copies, as
// layers do in a step, so that no op finds them in a cache.
class StepOps {
 public:
  StepOps(CpuDevice& device, Kernels& kernels, const StepShape& shape,
          DType act);

  const std::vector<StepOp>& ops() const { return ops_; }

 private:
  static constexpr int kCopies = 3;
  using Copies = std::vector<Tensor>;

  Copies New(const std::string& name, DType dtype, int64_t rows, int64_t cols,
             float deviation);
  void AddMatmuls(const std::string& name, int64_t n, int64_t k);
  void AddElementwise();
  void AddAttention();
  void AddHead();
  void AddOptimizer();

  CpuDevice& device_;
  Kernels& kernels_;
  const StepShape shape_;
  const DType act_;
  std::unique_ptr<Stream> stream_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  std::vector<int32_t> cu_seqlens_;
  std::vector<StepOp> ops_;
};

}  // namespace gradwire
