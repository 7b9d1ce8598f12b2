// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/gemm.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/bf16_gemm.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/gemm_product.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/squares.h"
#include "kernels/squares.h"

namespace gradwire {
namespace {

// Slices of fewer rows than this run below speed: cut columns instead.
constexpr int64_t kMinRows = 64;
// Slices start at multiples of one cache line of bf16.
constexpr int64_t kGrain = 32;
// Batches of ever new lengths would collect products, of about 100 KiB each,
// for ever.
constexpr size_t kMaxProducts = 512;

struct HashShape {
  size_t operator()(const GemmShape& s) const {
    size_t hash = static_cast<size_t>(s.ab) * 8 + static_cast<size_t>(s.c) * 2 +
                  static_cast<size_t>(s.accumulate);
    for (int64_t x :
         {s.m, s.n, s.k, s.a_row, s.a_col, s.b_row, s.b_col, s.c_row}) {
      hash = hash * 0x9e3779b97f4a7c15u + static_cast<size_t>(x);
    }
    return hash ^ (hash >> 32);
  }
};

// A bf16 matrix in f32, dense along the direction in which it is adjacent, so
// that nothing is turned around; the strides become those of the copy.
void WidenMatrix(const void* from, int64_t rows, int64_t cols,
                 int64_t* row_stride, int64_t* col_stride, float* to) {
  const BFloat16* x = static_cast<const BFloat16*>(from);
  if (*col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      Widen(x + r * *row_stride, cols, to + r * cols);
    }
    *row_stride = cols;
    return;
  }
  GW_CHECK(*row_stride == 1);
  for (int64_t c = 0; c < cols; ++c) {
    Widen(x + c * *col_stride, rows, to + c * rows);
  }
  *col_stride = rows;
}

}  // namespace

// What one thread owns: its primitives, their scratchpad, its oneDNN stream.
class Gemm::Core {
 public:
  Core() {
    GW_CHECK(dnnl_stream_create(&stream_, CpuEngine(),
                                dnnl_stream_default_flags) == dnnl_success);
  }
  ~Core() { dnnl_stream_destroy(stream_); }

  void Execute(const GemmShape& shape, const void* a, const void* b, void* c) {
    static thread_local const bool single = [] {
      omp_set_num_threads(1);
      return true;
    }();
    static_cast<void>(single);
    auto it = products_.find(shape);
    if (it == products_.end()) {
      if (products_.size() >= kMaxProducts) products_.clear();
      it = products_.emplace(shape, std::make_unique<Product>(shape)).first;
    }
    Product& product = *it->second;
    scratchpad_.Reserve(1, product.scratch_bytes());
    product.Execute(stream_, {const_cast<void*>(a), const_cast<void*>(b), c,
                              scratchpad_.part(0)});
  }

  // A part of a bf16 product by our own kernel.
  void ExecuteOwn(const GemmShape& shape, const GemmPart& part, const void* a,
                  const void* b, void* c, double* squares,
                  const CausalSkip* skip) {
    scratchpad_.Reserve(1, Bf16GemmScratchBytes(shape, part));
    Bf16GemmRun(shape, part, static_cast<const BFloat16*>(a),
                static_cast<const BFloat16*>(b), c, squares,
                scratchpad_.part(0), skip);
  }

  // bf16 on a machine that multiplies only f32.
  void ExecuteWidened(const GemmShape& shape, const void* a, const void* b,
                      void* c) {
    widened_.Reserve(1, Scratch::RoundUp(4 * shape.m * shape.k) +
                            Scratch::RoundUp(4 * shape.k * shape.n) +
                            Scratch::RoundUp(4 * shape.m * shape.n));
    ScratchCursor cursor(widened_.part(0));
    float* wide_a = cursor.Take<float>(shape.m * shape.k);
    float* wide_b = cursor.Take<float>(shape.k * shape.n);
    GemmShape wide = shape;
    wide.ab = wide.c = DType::kF32;
    WidenMatrix(a, shape.m, shape.k, &wide.a_row, &wide.a_col, wide_a);
    WidenMatrix(b, shape.k, shape.n, &wide.b_row, &wide.b_col, wide_b);
    if (shape.c == DType::kF32) {
      Execute(wide, wide_a, wide_b, c);
      return;
    }
    float* wide_c = cursor.Take<float>(shape.m * shape.n);
    BFloat16* narrow_c = static_cast<BFloat16*>(c);
    wide.c_row = shape.n;
    for (int64_t i = 0; shape.accumulate && i < shape.m; ++i) {
      Widen(narrow_c + i * shape.c_row, shape.n, wide_c + i * shape.n);
    }
    Execute(wide, wide_a, wide_b, wide_c);
    for (int64_t i = 0; i < shape.m; ++i) {
      Narrow(wide_c + i * shape.n, shape.n, narrow_c + i * shape.c_row);
    }
  }

 private:
  dnnl_stream_t stream_ = nullptr;
  Scratch scratchpad_, widened_;
  std::unordered_map<GemmShape, std::unique_ptr<Product>, HashShape> products_;
};

// The instruction set is asked of oneDNN, whose environment variable can cut it
// down.
Gemm::Gemm()
    : native_bf16_(HasBf16Product()),
      own_bf16_(HasBf16Dot() && Isa() == "avx512_bf16") {}
Gemm::~Gemm() = default;

std::string Gemm::Isa() {
  switch (dnnl_get_effective_cpu_isa()) {
    case dnnl_cpu_isa_avx512_core_amx:
      return "amx_bf16";
    case dnnl_cpu_isa_avx512_core_bf16:
      return "avx512_bf16";
    case dnnl_cpu_isa_avx512_core_vnni:
    case dnnl_cpu_isa_avx512_core:
      return "avx512";
    case dnnl_cpu_isa_avx2_vnni:
    case dnnl_cpu_isa_avx2:
      return "avx2";
    default:
      return "generic";
  }
}

void Gemm::Prepare(int num_threads) {
  while (static_cast<int>(cores_.size()) < num_threads) {
    cores_.push_back(std::make_unique<Core>());
  }
}

void Gemm::RunOne(int thread, const GemmShape& shape, const void* a,
                  const void* b, void* c, const CausalSkip* skip) {
  if (shape.m == 0 || shape.n == 0) return;
  if (shape.k == 0) {
    if (shape.accumulate) return;
    const int64_t bytes = DTypeBytes(shape.c);
    for (int64_t i = 0; i < shape.m; ++i) {
      std::memset(static_cast<char*>(c) + i * shape.c_row * bytes, 0,
                  static_cast<size_t>(shape.n * bytes));
    }
    return;
  }
  Core& core = *cores_[static_cast<size_t>(thread)];
  if (IsOwn(shape.ab)) {
    core.ExecuteOwn(shape, {0, shape.m, 0, shape.n}, a, b, c, nullptr, skip);
  } else if (shape.ab == DType::kBF16 && !native_bf16_) {
    core.ExecuteWidened(shape, a, b, c);
  } else {
    core.Execute(shape, a, b, c);
  }
}

void Gemm::Run(ThreadPool& pool, const GemmShape& shape, const void* a,
               const void* b, void* c, double* squares) {
  GW_CHECK(squares == nullptr || shape.c == DType::kF32);
  // Where columns may be cut. A sum of squares is made by one thread.
  const int64_t col_grain = squares == nullptr ? kGrain : kSquareBlock;
  const int threads = pool.num_threads();
  Prepare(threads);
  if (IsOwn(shape.ab) && shape.k > 0) {
    pool.Run([&](int thread) {
      const GemmPart part =
          Bf16GemmPart(shape, squares != nullptr, threads, thread);
      cores_[static_cast<size_t>(thread)]->ExecuteOwn(shape, part, a, b, c,
                                                      squares, nullptr);
    });
    return;
  }
  // The most row slices that are still tall; the rest of the threads share
  // each of them by columns.
  int row_cuts = threads;
  while (row_cuts > 1 &&
         (threads % row_cuts != 0 || shape.m < kMinRows * row_cuts)) {
    --row_cuts;
  }
  const int col_cuts = threads / row_cuts;
  const auto cut = [](int64_t size, int64_t grain, int64_t i, int64_t n) {
    return std::min(size, (size + grain - 1) / grain * i / n * grain);
  };
  const int64_t ab_bytes = DTypeBytes(shape.ab);
  const int64_t c_bytes = DTypeBytes(shape.c);
  pool.Run([&](int thread) {
    const int64_t r = thread / col_cuts, q = thread % col_cuts;
    const int64_t row = cut(shape.m, kGrain, r, row_cuts);
    const int64_t col = cut(shape.n, col_grain, q, col_cuts);
    GemmShape slice = shape;
    slice.m = cut(shape.m, kGrain, r + 1, row_cuts) - row;
    slice.n = cut(shape.n, col_grain, q + 1, col_cuts) - col;
    char* part = static_cast<char*>(c) + (row * shape.c_row + col) * c_bytes;
    RunOne(thread, slice,
           static_cast<const char*>(a) + row * shape.a_row * ab_bytes,
           static_cast<const char*>(b) + col * shape.b_col * ab_bytes, part);
    if (squares == nullptr) return;
    // While the slice is in a cache.
    const int64_t blocks = SquareBlocks(shape.n);
    SquaresOfRows(reinterpret_cast<const float*>(part), slice.m, slice.n,
                  shape.c_row, squares + row * blocks + col / kSquareBlock,
                  blocks);
  });
}

}  // namespace gradwire
