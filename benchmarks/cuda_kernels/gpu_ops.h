// SPDX-License-Identifier: Apache-2.0
// The ops of a layer and of the optimizer's step, at one model's shapes on a
// GPU, and the work each must do.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "benchmarks/kernels/op_work.h"
#include "device/cuda/cuda_device.h"
#include "kernels/kernels.h"

namespace gradwire {

struct GpuShape {
  // A multiple of `length`, that of its sequences.
  int64_t tokens = 4096, length = 4096;
  int64_t hidden = 2048, ffn = 6144;
  int64_t heads = 16, kv_heads = 8, head_dim = 128;
  int64_t vocab = 151936;
};

struct GpuOp {
  std::string name;
  Work work;  // of a call
  std::function<void(int call)> run;
  std::vector<Tensor> outputs;  // of call 0
};

// Owns what the ops work on. Operands rotate over copies, so that no op finds
// them in a cache; all tensors of a name are the same for all ops.
class GpuOps {
 public:
  GpuOps(CudaDevice& device, Kernels& kernels, Stream& stream,
         const GpuShape& shape, DType act);

  const std::vector<GpuOp>& ops() const { return ops_; }

 private:
  // Of the smallest operand these are more than any GPU's second-level cache.
  static constexpr int kCopies = 6;
  using Copies = std::vector<Tensor>;

  // Normally distributed; whole numbers are zeros.
  Copies New(DType dtype, int64_t rows, int64_t columns, int copies = kCopies,
             float deviation = 0.02f);
  // 1-D.
  Tensor Vector(DType dtype, int64_t n);
  Tensor Ids(int64_t n, int64_t limit);
  void Add(const std::string& name, const Work& work,
           std::function<void(size_t copy)> run,
           const std::vector<Tensor>& outputs, int copies = kCopies);
  void AddRows();
  void AddSwiGlu();
  void AddOptimizer();
  // gpu_layer_ops.cc
  void AddEmbedding();
  void AddNorms();
  void AddRope();
  void AddBias();
  // gpu_product_ops.cc
  AttentionShape Heads() const;
  void AddMatmuls(const std::string& name, int64_t outputs, int64_t inputs);
  void AddAttention();
  void AddHead();

  CudaDevice& device_;
  Kernels& kernels_;
  Stream& stream_;
  const GpuShape shape_;
  const DType act_;
  std::vector<int32_t> cu_seqlens_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  std::vector<GpuOp> ops_;
};

}  // namespace gradwire
