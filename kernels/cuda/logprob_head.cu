// SPDX-License-Identifier: Apache-2.0
// Bound by the second-level cache, where the product has left the chunk: a
// block reads one row once, into registers, and takes all that is wanted of it
// from there. A forward of 152k ids so costs little beside its products.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "base/check.h"
#include "device/cuda/kernel.h"
#include "device/dtype.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/logprob_head_kernels.h"
#include "kernels/cuda/reduce.h"

namespace gradwire {
namespace {

constexpr int kThreads = 128;
constexpr int kPack = 4;
constexpr int kPacks = static_cast<int>(kLogitIds) / kThreads / kPack;

// As many threads as a row needs, whole warps.
unsigned ThreadsFor(int64_t cols) {
  constexpr int64_t kOfWarp = kWarpSize * kPacks * kPack;
  return static_cast<unsigned>((cols + kOfWarp - 1) / kOfWarp * kWarpSize);
}

// ---- The largest logits -----------------------------------------------------

// Greater for a larger logit, then for a lower id. Zeros of both signs are
// equal.
__device__ inline uint64_t KeyOf(float logit, int32_t id) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);
  const uint32_t order = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return uint64_t{order} << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ inline float LogitOf(uint64_t key) {
  const auto order = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>((order >> 31) != 0 ? order & 0x7fffffffu
                                                 : ~order);
}
__device__ inline int32_t IdOf(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// Over the block, for every thread. It begins with a barrier.
__device__ inline uint64_t BlockMaxKey(uint64_t key,
                                       SharedArray<uint64_t> shared) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, key, lanes);
    key = key > other ? key : other;
  }
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) {
    shared[static_cast<int>(threadIdx.x) / kWarpSize] = key;
  }
  __syncthreads();
  for (int i = 0; i < warps; ++i) {
    const uint64_t other = shared[i];
    key = key > other ? key : other;
  }
  return key;
}

// Takes `key` into `list`, descending; its last one goes.
__device__ inline void Insert(uint64_t key, SharedArray<uint64_t> list) {
  int at = list.size() - 1;
  for (; at > 0; --at) {
    const uint64_t above = list[at - 1];
    if (above > key) break;
    list[at] = above;
  }
  list[at] = key;
}

// The logits that a thread has of its row: pack p is of the ids from
// (p * blockDim.x + threadIdx.x) * kPack on.
struct RowPart {
  float logit[kPacks][kPack];
};
__device__ inline int FirstColumn(int pack) {
  return (pack * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) *
         kPack;
}

// Returns the largest logit that the thread has.
__device__ inline float LoadRow(const float* logits, int64_t cols,
                                RowPart& part) {
  float max = -INFINITY;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = FirstColumn(p);
    Pack<float, kPack> pack = {};
    if (column < cols) pack = LoadPack<kPack>(logits + column);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      part.logit[p][j] = column + j < cols ? pack.element[j] : -INFINITY;
      max = fmaxf(max, part.logit[p][j]);
    }
  }
  return max;
}

// Merges the chunk's largest logits, from the largest down, into what is in
// global memory, for as long as they are among the top_k.
__device__ inline void TakeTop(const RowPart& part, const LogitChunk& chunk,
                               const LogprobRows& rows, float row_max,
                               float lse) {
  SharedMemory shared;
  (void)shared.Take<float>(kThreads / kWarpSize);  // the reductions'
  const SharedArray<uint64_t> reduce =
      shared.Take<uint64_t>(kThreads / kWarpSize);
  const int top_k = static_cast<int>(rows.top_k);
  const SharedArray<uint64_t> list = shared.Take<uint64_t>(top_k);
  float* const top = rows.top_logprobs + blockIdx.x * rows.top_k;
  int32_t* const ids = rows.top_ids + blockIdx.x * rows.top_k;
  const auto first_id = static_cast<int32_t>(chunk.first_id);
  const bool first = first_id == 0;
  const bool last = chunk.first_id + chunk.cols == chunk.vocab;
  const int self = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);

  const uint64_t least = KeyOf(-INFINITY, INT32_MAX);
  uint64_t bound = first ? least : KeyOf(top[top_k - 1], ids[top_k - 1]);
  const bool any = KeyOf(row_max, first_id) > bound;
  if (any) {
    for (int i = self; i < top_k; i += threads) {
      list[i] = first ? least : KeyOf(top[i], ids[i]);
    }
    uint64_t taken = ~uint64_t{0};
    for (int i = 0; i < top_k; ++i) {
      uint64_t best = 0;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const int column = FirstColumn(p) + j;
          const uint64_t key = column < chunk.cols
                                   ? KeyOf(part.logit[p][j], first_id + column)
                                   : 0;
          if (key < taken && key > best) best = key;
        }
      }
      taken = BlockMaxKey(best, reduce);
      if (taken <= bound) break;
      if (self == 0) Insert(taken, list);
      __syncthreads();
      bound = list[top_k - 1];
    }
  }
  // What others have read of the list, here or in global memory, is written.
  __syncthreads();
  if (!any && !last) return;
  for (int i = self; i < top_k; i += threads) {
    float logit = 0;
    if (any) {
      const uint64_t key = list[i];
      logit = LogitOf(key);
      ids[i] = IdOf(key);
    } else {
      logit = top[i];
    }
    top[i] = last ? logit - lse : logit;
  }
}

// ---- The forward ------------------------------------------------------------

// A block takes a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    TakeLogitsKernel(LogitChunk chunk, LogprobRows rows, KeptChunk<T> kept) {
  SharedMemory shared;
  const SharedArray<float> reduce = shared.Take<float>(kThreads / kWarpSize);
  const int64_t row = blockIdx.x;
  const float* const logits = chunk.logits + row * chunk.row_stride;

  RowPart part;
  const float row_max = BlockMax(LoadRow(logits, chunk.cols, part), reduce);
  T* const exps =
      kept.exps == nullptr ? nullptr : kept.exps + row * kept.row_stride;
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    Pack<T, kPack> pack;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float e = expf(part.logit[p][j] - row_max);
      sum += e;
      pack.element[j] = T(e);
    }
    if (exps != nullptr && FirstColumn(p) < chunk.cols) {
      StorePack(exps + FirstColumn(p), pack);
    }
  }
  sum = BlockSum(sum, reduce);

  const bool last = chunk.first_id + chunk.cols == chunk.vocab;
  float whole_max = row_max;
  // Every thread needs the whole sum at the end, before then one does.
  if (chunk.first_id > 0 && (last || threadIdx.x == 0)) {
    const float before = rows.max[row];
    whole_max = fmaxf(before, row_max);
    sum = rows.sum[row] * expf(before - whole_max) +
          sum * expf(row_max - whole_max);
  }
  const float lse = whole_max + logf(sum);
  if (threadIdx.x == 0) {
    if (exps != nullptr) kept.maxima[row] = row_max;
    if (last) {
      rows.lse[row] = lse;
    } else {
      rows.max[row] = whole_max;
      rows.sum[row] = sum;
    }
  }
  for (int64_t j = threadIdx.x; j < rows.k; j += blockDim.x) {
    const int64_t at = row * rows.k + j;
    const int64_t column = rows.targets[at] - chunk.first_id;
    const bool here = column >= 0 && column < chunk.cols;
    if (!here && !last) continue;
    const float logit = here ? logits[column] : rows.logprobs[at];
    rows.logprobs[at] = last ? logit - lse : logit;
    if (last && exps != nullptr) kept.logprobs[at] = logit - lse;
  }
  if (rows.top_k > 0) TakeTop(part, chunk, rows, row_max, lse);
}

// ---- The backward -----------------------------------------------------------

// p of an id is e exp(max - lse), e in T, whether it was kept or is made again;
// of a target it is exp(logprob) in float32, so that 1 - p keeps its digits
// where p is near 1.

// The sum of a row's d_logprobs, for every thread.
__device__ inline float SumOfTargets(const float* d_logprobs, int64_t k) {
  float total = 0;
  for (int64_t j = threadIdx.x % kWarpSize; j < k; j += kWarpSize) {
    total += d_logprobs[j];
  }
  return WarpSum(total);
}

// Writes d_logit of the row's targets, over what was written of them before;
// logprob(j, column) is that of target j.
template <typename T, typename Logprob>
__device__ inline void WriteTargets(const LogitChunk& chunk,
                                    const LogitGradRows& rows, int64_t row,
                                    float total, T* out,
                                    const Logprob& logprob) {
  const int32_t* const targets = rows.targets + row * rows.k;
  const float* const d_logprobs = rows.d_logprobs + row * rows.k;
  __syncthreads();
  for (int64_t j = threadIdx.x; j < rows.k; j += blockDim.x) {
    const int64_t column = targets[j] - chunk.first_id;
    if (column < 0 || column >= chunk.cols) continue;
    // A target that comes twice is its first one's.
    float of_target = 0;
    bool first = true;
    for (int64_t other = 0; other < rows.k; ++other) {
      if (targets[other] != targets[j]) continue;
      first = first && other >= j;
      of_target += d_logprobs[other];
    }
    if (!first) continue;
    out[column] = T(of_target - total * expf(logprob(j, column)));
  }
}

// A block takes a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    LogitGradKernel(LogitChunk chunk, LogitGradRows rows, T* d_logit,
                    int64_t d_stride) {
  SharedMemory shared;
  const SharedArray<float> reduce = shared.Take<float>(kThreads / kWarpSize);
  const int64_t row = blockIdx.x;
  const float* const logits = chunk.logits + row * chunk.row_stride;
  const float lse = rows.lse[row];
  T* const out = d_logit + row * d_stride;

  RowPart part;
  const float row_max = BlockMax(LoadRow(logits, chunk.cols, part), reduce);
  const float total = SumOfTargets(rows.d_logprobs + row * rows.k, rows.k);
  const float scale = -total * expf(row_max - lse);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (FirstColumn(p) >= chunk.cols) continue;
    Pack<T, kPack> d;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const T e = T(expf(part.logit[p][j] - row_max));
      d.element[j] = T(scale * static_cast<float>(e));
    }
    StorePack(out + FirstColumn(p), d);
  }
  WriteTargets(chunk, rows, row, total, out,
               [&](int64_t, int64_t column) { return logits[column] - lse; });
}

// A block takes a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    KeptLogitGradKernel(LogitChunk chunk, LogitGradRows rows, KeptChunk<T> kept,
                        const int32_t* kept_rows, T* d_logit,
                        int64_t d_stride) {
  constexpr int kN = kPackOf<T>;
  const int64_t row = blockIdx.x;
  const int64_t from = kept_rows == nullptr ? row : kept_rows[row];
  const T* const exps = kept.exps + from * kept.row_stride;
  T* const out = d_logit + row * d_stride;

  const float total = SumOfTargets(rows.d_logprobs + row * rows.k, rows.k);
  const float scale = -total * expf(kept.maxima[from] - rows.lse[row]);
  const int stride = static_cast<int>(blockDim.x) * kN;
#pragma unroll 2
  for (int column = static_cast<int>(threadIdx.x) * kN; column < chunk.cols;
       column += stride) {
    const Pack<T, kN> e = LoadPack<kN>(exps + column);
    Pack<T, kN> d;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      d.element[i] = T(scale * static_cast<float>(e.element[i]));
    }
    StorePack(out + column, d);
  }
  WriteTargets(chunk, rows, row, total, out, [&](int64_t j, int64_t) {
    return kept.logprobs[from * rows.k + j];
  });
}

}  // namespace

template <typename T>
cudaError_t TakeLogits(const LogitChunk& chunk, const LogprobRows& rows,
                       const KeptChunk<T>& kept, cudaStream_t stream) {
  GW_CHECK(chunk.cols <= kLogitIds && rows.top_k <= kMaxTopK);
  // Arrays begin at multiples of 128 bytes.
  const size_t shared_bytes =
      128 + (rows.top_k == 0
                 ? 0
                 : 128 + static_cast<size_t>(rows.top_k) * sizeof(uint64_t));
  return Launch(TakeLogitsKernel<T>, dim3(static_cast<unsigned>(chunk.rows)),
                dim3(ThreadsFor(chunk.cols)), shared_bytes, stream, chunk, rows,
                kept);
}

template <typename T>
cudaError_t MakeLogitGrad(const LogitChunk& chunk, const LogitGradRows& rows,
                          T* d_logit, int64_t d_stride, cudaStream_t stream) {
  GW_CHECK(chunk.cols <= kLogitIds);
  return Launch(LogitGradKernel<T>, dim3(static_cast<unsigned>(chunk.rows)),
                dim3(ThreadsFor(chunk.cols)), 128, stream, chunk, rows, d_logit,
                d_stride);
}

template <typename T>
cudaError_t MakeKeptLogitGrad(const LogitChunk& chunk,
                              const LogitGradRows& rows,
                              const KeptChunk<T>& kept,
                              const int32_t* kept_rows, T* d_logit,
                              int64_t d_stride, cudaStream_t stream) {
  return Launch(KeptLogitGradKernel<T>, dim3(static_cast<unsigned>(chunk.rows)),
                dim3(ThreadsFor(chunk.cols)), 0, stream, chunk, rows, kept,
                kept_rows, d_logit, d_stride);
}

#define GRADWIRE_HEAD_KERNELS(T)                                              \
  template cudaError_t TakeLogits(const LogitChunk&, const LogprobRows&,      \
                                  const KeptChunk<T>&, cudaStream_t);         \
  template cudaError_t MakeLogitGrad(const LogitChunk&, const LogitGradRows&, \
                                     T*, int64_t, cudaStream_t);              \
  template cudaError_t MakeKeptLogitGrad(                                     \
      const LogitChunk&, const LogitGradRows&, const KeptChunk<T>&,           \
      const int32_t*, T*, int64_t, cudaStream_t)
GRADWIRE_HEAD_KERNELS(float);
GRADWIRE_HEAD_KERNELS(BFloat16);
#undef GRADWIRE_HEAD_KERNELS

}  // namespace gradwire
