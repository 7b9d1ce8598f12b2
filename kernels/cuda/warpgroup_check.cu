// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <vector>

#include "device/cuda/kernel.h"
#include "device/cuda/warpgroup.h"
#include "device/host_device.h"
#include "kernels/cuda/warpgroup_check.h"

namespace gradwire {
namespace {

// As attention: two warpgroups, rows that were copied, panels of 64 and of 128.
constexpr int kThreads = 2 * kWarpgroup;
constexpr int kRows = 128;
constexpr int kDim = 128;
constexpr int kHalf = kDim / 2;
using Tile = SwizzledTile<kRows, kDim>;
constexpr std::size_t kSharedBytes = sizeof(BFloat16) * 2 * Tile::kElements;

// Small whole numbers, whose products add up without rounding. They repeat
// after 11 and 13 rows or columns, and what takes one for another is off by a
// multiple of 8.
GW_HOST_DEVICE inline int OfA(int row, int column) {
  return (row * 7 + column * 3 + row * column) % 11 - 5;
}
GW_HOST_DEVICE inline int OfB(int row, int column) {
  return (row * 5 + column * 11 + row * column) % 13 - 6;
}

struct Results {
  float* by_rows;        // a b^T: [128, 128]
  float* by_columns;     // a b: [128, 128]
  float* by_rows_64;     // the first 64 columns of a b^T
  float* by_columns_64;  // and of a b
  BFloat16* a;           // [128, 128], for the kernel itself
};

template <int kTiles>
__device__ inline void Store(const WarpgroupSums<kTiles>& d, float* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[(row + i / 2 * 8) * kTiles * 8 + n * 8 + lane % 4 * 2 + i % 2] =
          d[n][i];
    }
  }
}

using Left = uint32_t[kDim / 16][4];

// Both products of one number of columns; a sum that was there before is not to
// be added to.
template <int kTiles>
__device__ inline void Multiply(const Tile& a, const Tile& b, const Left& left,
                                float* by_rows, float* by_columns) {
  const int first_row = static_cast<int>(threadIdx.x) / kWarpgroup * 64;
  WarpgroupSums<kTiles> rows, columns;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[n][i] = columns[n][i] = 1.0f;
  }
  BeginProducts();
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    MultiplyRows(rows, a.Rows(first_row, k), b.Rows(0, k), k > 0);
  }
  CommitProducts();
  BeginProducts();
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    MultiplyColumns(columns, left[k / 16], b.Columns(k), k > 0);
  }
  CommitProducts();
  WaitProducts<1>();
  HoldSums(rows);
  Store(rows, by_rows);
  WaitProducts<0>();
  HoldSums(columns);
  Store(columns, by_columns);
}

__global__ void __launch_bounds__(kThreads) CheckKernel(Results results) {
  if constexpr (kHasWarpgroups) {
    SharedMemory memory;
    const Tile a{memory.Take<BFloat16, Tile::kAlign>(Tile::kElements)};
    const Tile b{memory.Take<BFloat16, Tile::kAlign>(Tile::kElements)};
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < Tile::kElements; i += kThreads) {
      const int row = i / kDim, column = i % kDim;
      results.a[i] = BFloat16(static_cast<float>(OfA(row, column)));
      b.elements[Tile::At(row, column)] =
          BFloat16(static_cast<float>(OfB(row, column)));
    }
    __syncthreads();
    for (int i = thread * 8; i < Tile::kElements; i += kThreads * 8) {
      CopyAsync16(a.elements, Tile::At(i / kDim, i % kDim),
                  static_cast<const BFloat16*>(results.a) + i);
    }
    CommitAsync();
    WaitAsync<0>();
    ShowToProducts();
    __syncthreads();

    const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    Left left;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int column = k * 16 + r / 2 * 8 + lane % 4 * 2;
        left[k][r] =
            PackBf16(static_cast<float>(OfA(row + r % 2 * 8, column)),
                     static_cast<float>(OfA(row + r % 2 * 8, column + 1)));
      }
    }
    Multiply<kDim / 8>(a, b, left, results.by_rows, results.by_columns);
    Multiply<kHalf / 8>(a, b, left, results.by_rows_64, results.by_columns_64);
  }
}

// Of [128, columns] in `got`, how many differ from the sums of a(i, k) b(j, k).
template <class B>
int CountWrong(const float* got, int columns, const B& b) {
  int wrong = 0;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < columns; ++j) {
      int want = 0;
      for (int k = 0; k < kDim; ++k) want += OfA(i, k) * b(j, k);
      // NaN where nothing was written.
      if (!(got[i * columns + j] == static_cast<float>(want))) ++wrong;
    }
  }
  return wrong;
}

}  // namespace

cudaError_t CheckWarpgroups(float* room, WarpgroupCheck& check) {
  constexpr int64_t kWide = int64_t{kRows} * kDim;
  constexpr int64_t kNarrow = int64_t{kRows} * kHalf;
  constexpr int64_t kResults = 2 * (kWide + kNarrow);
  static_assert(kResults + kWide / 2 == kWarpgroupCheckFloats);
  const Results results = {room, room + kWide, room + 2 * kWide,
                           room + 2 * kWide + kNarrow,
                           reinterpret_cast<BFloat16*>(room + kResults)};
  cudaError_t error =
      cudaMemsetAsync(room, 0xff, kResults * sizeof(float), nullptr);
  if (error != cudaSuccess) return error;
  error = LaunchWarpgroups(CheckKernel, dim3(1), dim3(kThreads), kSharedBytes,
                           nullptr, results);
  if (error != cudaSuccess) return error;
  std::vector<float> got(kResults);
  error = cudaMemcpyAsync(got.data(), room, got.size() * sizeof(float),
                          cudaMemcpyDeviceToHost, nullptr);
  if (error != cudaSuccess) return error;
  error = cudaStreamSynchronize(nullptr);
  if (error != cudaSuccess) return error;
  const auto along_columns = [](int j, int k) { return OfB(k, j); };
  check.by_rows = CountWrong(got.data(), kDim, OfB);
  check.by_columns = CountWrong(got.data() + kWide, kDim, along_columns);
  check.by_rows_64 = CountWrong(got.data() + 2 * kWide, kHalf, OfB);
  check.by_columns_64 =
      CountWrong(got.data() + 2 * kWide + kNarrow, kHalf, along_columns);
  return cudaSuccess;
}

}  // namespace gradwire
