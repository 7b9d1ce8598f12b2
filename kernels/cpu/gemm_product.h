// SPDX-License-Identifier: Apache-2.0
// One oneDNN matrix product: a primitive of one shape with its argument slots.
#pragma once

#include <oneapi/dnnl/dnnl.h>

#include <array>
#include <cstdint>

#include "kernels/cpu/gemm.h"

namespace gradwire {

// The process's CPU engine.
dnnl_engine_t CpuEngine();

// Whether the processor multiplies bf16. Where it does not, oneDNN has bf16
// products for AVX-512 that take three times as long as those in f32, and none
// for AVX2.
bool HasBf16Product();

// Thread rule: one thread at a time, always the same.
class Product {
 public:
  // REQUIRES: HasBf16Product() if the shape has bf16.
  explicit Product(const GemmShape& shape);
  ~Product();
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  int64_t scratch_bytes() const { return scratch_bytes_; }

  // `data`: a, b, c and scratch_bytes() of scratch.
  void Execute(dnnl_stream_t stream, const std::array<void*, 4>& data);

 private:
  dnnl_primitive_t primitive_ = nullptr;
  std::array<dnnl_exec_arg_t, 4> args_ = {};
  int64_t scratch_bytes_ = 0;
};

}  // namespace gradwire
