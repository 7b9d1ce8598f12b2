// SPDX-License-Identifier: Apache-2.0
// Matrix products, one core at a time.
//
// bf16 products go to our own kernel (bf16_gemm.h) where the processor has
// AVX512-BF16 and no AMX, all others to oneDNN. oneDNN brings OpenMP threads of
// its own; two pools would fight for the cores. So each thread of our pool runs
// a single-threaded product on a slice of the result. The inner dimension is
// never cut: every element of the result is one sum in one order, whatever the
// number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device/dtype.h"
#include "device/thread_pool.h"

namespace gradwire {

// c = a b, or c += a b: a [m, k], b [k, n], c [m, n]. Strides in elements; c's
// columns are adjacent.
struct GemmShape {
  int64_t m = 0, n = 0, k = 0;
  int64_t a_row = 0, a_col = 1;
  int64_t b_row = 0, b_col = 1;
  int64_t c_row = 0;
  DType ab = DType::kF32;  // f32 or bf16
  DType c = DType::kF32;   // f32, or bf16 if ab is
  // Sums are float32; c is rounded once, after its old value is added.
  bool accumulate = false;

  bool operator==(const GemmShape&) const = default;
};

// What the causal mask lets a product of attention leave out. Of a tile of
// scores, query row r sees the keys below visible + r / group.
struct CausalSkip {
  enum class Of {
    kResult,         // c [queries, keys]: what is hidden may stay undefined
    kLeft,           // a [queries, keys] is 0 where hidden
    kLeftTransposed  // a [keys, queries] is 0 where hidden
  };
  Of of = Of::kResult;
  int64_t visible = 0;  // may be negative
  int64_t group = 1;
};

// Thread rule: Run and Prepare from one thread at a time; RunOne(t) from one
// thread for each t.
class Gemm {
 public:
  Gemm();
  ~Gemm();

  // The best instruction set that oneDNN uses here: "avx512_bf16".
  static std::string Isa();

  // Whether products of these operands are our own.
  bool IsOwn(DType ab) const { return ab == DType::kBF16 && own_bf16_; }

  // Makes room for threads 0 .. num_threads-1. REQUIRED before RunOne.
  void Prepare(int num_threads);
  // On the calling thread, which is number `thread` of its pool. `skip` is null
  // or what need not be computed; it may be computed all the same.
  void RunOne(int thread, const GemmShape& shape, const void* a, const void* b,
              void* c, const CausalSkip* skip = nullptr);
  // On all threads of the pool. `squares` is null or [m, SquareBlocks(n)], =:
  // c's sums of squares, the same bits on any number of threads. REQUIRES: c is
  // f32 then.
  void Run(ThreadPool& pool, const GemmShape& shape, const void* a,
           const void* b, void* c, double* squares = nullptr);

 private:
  class Core;
  // bf16 operands can go to oneDNN as they are.
  const bool native_bf16_;
  // They go to Bf16GemmRun instead.
  const bool own_bf16_;
  std::vector<std::unique_ptr<Core>> cores_;
};

}  // namespace gradwire
