// SPDX-License-Identifier: Apache-2.0
// What the logprob head does with logits between the products
// (logprob_head.cc).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gradwire {

// Ids that a row of a chunk may have, and the most of top_k.
inline constexpr int64_t kLogitIds = 2048;
inline constexpr int64_t kMaxTopK = 4096;

// f32 [rows, row_stride], the logits of the ids [first_id, first_id + cols) of
// `vocab`. Rows are aligned to 32 bytes; what lies in them beyond cols is not
// used.
struct LogitChunk {
  const float* logits = nullptr;
  int64_t row_stride = 0;
  int64_t rows = 0;
  int64_t first_id = 0;
  int64_t cols = 0;
  int64_t vocab = 0;
};

// What a forward keeps of a chunk for the backward, T being float or BFloat16:
// e = exp(logit - max), max being the row's largest logit of the chunk.
template <typename T>
struct KeptChunk {
  // [rows, row_stride], aligned to 16 bytes; null: nothing is kept. What lies
  // in a row beyond cols, up to a multiple of 4 elements, may be written.
  T* exps = nullptr;
  int64_t row_stride = 0;
  float* maxima = nullptr;    // [rows]
  float* logprobs = nullptr;  // [rows, k], of the targets
};

// Of the same rows.
struct LogprobRows {
  const int32_t* targets = nullptr;  // [rows, k]
  int64_t k = 0;
  int64_t top_k = 0;
  float* logprobs = nullptr;      // [rows, k]
  float* lse = nullptr;           // [rows]
  float* top_logprobs = nullptr;  // [rows, top_k]
  int32_t* top_ids = nullptr;     // [rows, top_k]
  // [rows]: of the logits so far, the largest, and the sum of exp(logit - max).
  float* max = nullptr;
  float* sum = nullptr;
};

// Takes the chunks of a row's logits, which come in ascending order; after the
// last one the outputs are whole, those of `kept` as well.
template <typename T>
cudaError_t TakeLogits(const LogitChunk& chunk, const LogprobRows& rows,
                       const KeptChunk<T>& kept, cudaStream_t stream);

struct LogitGradRows {
  const int32_t* targets = nullptr;   // [rows, k]
  const float* d_logprobs = nullptr;  // [rows, k]
  const float* lse = nullptr;         // [rows]
  int64_t k = 0;
};

// d_logit [rows, d_stride] of the chunk, =, T float or BFloat16; rows are
// aligned to 16 bytes, and what lies in a row beyond cols, up to a multiple of
// 16 bytes, may be written.
template <typename T>
cudaError_t MakeLogitGrad(const LogitChunk& chunk, const LogitGradRows& rows,
                          T* d_logit, int64_t d_stride, cudaStream_t stream);

// The same bits from what was kept: chunk.logits is not used. kept_rows
// [rows]: of which row of the forward each row is, or null: of the same.
template <typename T>
cudaError_t MakeKeptLogitGrad(const LogitChunk& chunk,
                              const LogitGradRows& rows,
                              const KeptChunk<T>& kept,
                              const int32_t* kept_rows, T* d_logit,
                              int64_t d_stride, cudaStream_t stream);

}  // namespace gradwire
