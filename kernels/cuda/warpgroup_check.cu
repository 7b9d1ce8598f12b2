// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <vector>

#include "device/cuda/kernel.h"
#include "device/cuda/warpgroup.h"
#include "device/host_device.h"
#include "kernels/cuda/warpgroup_check.h"

namespace gradwire {
namespace {

constexpr int kRows = 64;
constexpr int kDim = 128;
using A = SwizzledTile<kRows, kDim>;
using B = SwizzledTile<kDim, kDim>;
constexpr std::size_t kSharedBytes =
    sizeof(BFloat16) * (A::kElements + B::kElements);

// Small whole numbers: their products add up without rounding, and no two rows
// or columns are alike.
GW_HOST_DEVICE inline int OfA(int row, int column) {
  return (row * 7 + column * 3 + row * column) % 11 - 5;
}
GW_HOST_DEVICE inline int OfB(int row, int column) {
  return (row * 5 + column * 11 + row * column) % 13 - 6;
}

template <class Tile, class Value>
__device__ inline void Fill(const Tile& tile, const Value& value) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kElements;
       i += kWarpgroup) {
    const int row = i / Tile::kColumns, column = i % Tile::kColumns;
    tile.elements[Tile::At(row, column)] =
        BFloat16(static_cast<float>(value(row, column)));
  }
}

__device__ inline void Store(const WarpgroupSums<kDim / 8>& d, float* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[(row + i / 2 * 8) * kDim + n * 8 + lane % 4 * 2 + i % 2] = d[n][i];
    }
  }
}

// by_rows = a b^T and by_columns = a b.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    CheckKernel(float* by_rows, float* by_columns) {
  if constexpr (kHasWarpgroups) {
    SharedMemory memory;
    const A a{memory.Take<BFloat16, A::kAlign>(A::kElements)};
    const B b{memory.Take<BFloat16, B::kAlign>(B::kElements)};
    Fill(a, OfA);
    Fill(b, OfB);
    ShowToProducts();
    __syncthreads();

    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
    uint32_t left[kDim / 16][4];
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
    WarpgroupSums<kDim / 8> d_rows, d_columns;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d_rows[n][i] = d_columns[n][i] = 1.0f;
    }
    BeginProducts();
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      MultiplyRows(d_rows, a.Rows(0, k), b.Rows(0, k), k > 0);
    }
    CommitProducts();
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      MultiplyColumns(d_columns, left[k / 16], b.Columns(k), k > 0);
    }
    CommitProducts();
    WaitProducts<1>();
    HoldSums(d_rows);
    Store(d_rows, by_rows);
    WaitProducts<0>();
    HoldSums(d_columns);
    Store(d_columns, by_columns);
  }
}

}  // namespace

cudaError_t CheckWarpgroups(float* room, bool& right) {
  right = false;
  constexpr int64_t kEach = int64_t{kRows} * kDim;
  static_assert(2 * kEach == kWarpgroupCheckFloats);
  cudaError_t error = cudaMemsetAsync(room, 0xff, 2 * kEach * sizeof(float), 0);
  if (error != cudaSuccess) return error;
  error = LaunchWarpgroups(CheckKernel<kWarpgroup>, dim3(1), dim3(kWarpgroup),
                           kSharedBytes, nullptr, room, room + kEach);
  if (error != cudaSuccess) return error;
  std::vector<float> got(2 * kEach);
  error = cudaMemcpyAsync(got.data(), room, got.size() * sizeof(float),
                          cudaMemcpyDeviceToHost, nullptr);
  if (error != cudaSuccess) return error;
  error = cudaStreamSynchronize(nullptr);
  if (error != cudaSuccess) return error;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kDim; ++j) {
      int by_rows = 0, by_columns = 0;
      for (int k = 0; k < kDim; ++k) {
        by_rows += OfA(i, k) * OfB(j, k);
        by_columns += OfA(i, k) * OfB(k, j);
      }
      const int64_t at = int64_t{i} * kDim + j;
      // NaN where nothing was written.
      if (!(got[at] == static_cast<float>(by_rows)) ||
          !(got[kEach + at] == static_cast<float>(by_columns))) {
        return cudaSuccess;
      }
    }
  }
  right = true;
  return cudaSuccess;
}

}  // namespace gradwire
