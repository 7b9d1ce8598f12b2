// SPDX-License-Identifier: Apache-2.0
// Products of a warpgroup, four warps whose first is a multiple of four, on the
// tensor cores of sm_90a (PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate"). Operands are read from shared memory, by hardware that
// does not see what threads have written there before they say so, and results
// are in registers only when they have been waited for:
//
//   ShowToProducts(); __syncthreads();     // what threads have written
//   BeginProducts();                       // begins a group
//   Multiply...(d, ...);                   // each adds 16 terms to d
//   CommitProducts();                      // ends a group
//   ...                                    // what else there is to do
//   WaitProducts<0>();                     // d is there, operands are free
//
// All lanes of all four warps do the same. On other architectures kernels that
// use them are empty (kHasWarpgroups).
#pragma once

#include <cstdint>

#include "device/cuda/kernel.h"
#include "device/dtype.h"

namespace gradwire {

inline constexpr int kWarpgroup = 128;

// A tile of kRows rows of kColumns elements of bf16 as the hardware reads it:
// in panels of 64 columns, one after the other. A row of a panel is 128 bytes,
// of which 16 bytes change places with others by the number of the row, so that
// eight rows lie in different banks.
template <int kRows_, int kColumns_>
struct SwizzledTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kElements = kRows * kColumns;
  static constexpr int kPanel = 64;
  // Of its first element in shared memory, in bytes.
  static constexpr int kAlign = 1024;
  static_assert(kRows % 8 == 0 && kColumns % kPanel == 0);

  SharedArray<BFloat16> elements;

  // Place of an element.
  __device__ static constexpr int At(int row, int column) {
    return Start(row, column) + ((column % kPanel / 8) ^ (row % 8)) * 8 +
           column % 8;
  }

  // 16 columns from `column` on, a multiple of 16, of the rows from `row` on, a
  // multiple of 8: terms along rows.
  __device__ uint64_t Rows(int row, int column) const {
    // From 8 rows to the next; the other distance is not asked for.
    return Descriptor(Start(row, column) + column % kPanel, 16, kStripBytes);
  }
  // 16 rows from `row` on, a multiple of 16, of all columns: terms along
  // columns.
  __device__ uint64_t Columns(int row) const {
    // From panel to panel, and from 8 rows to the next.
    return Descriptor(Start(row, 0), kRows * kPanel * 2, kStripBytes);
  }

 private:
  static constexpr int kStripBytes = 8 * kPanel * 2;

  // Of the row of the panel.
  __device__ static constexpr int Start(int row, int column) {
    return (column / kPanel * kRows + row) * kPanel;
  }
  // PTX ISA, "Matrix Descriptor": address, distances along and across what is
  // contiguous, all by 16 bytes, and in the top bits 1 for this swizzle.
  __device__ uint64_t Descriptor(int element, int leading, int stride) const {
    return (elements.Address(element) & 0x3ffffu) >> 4 |
           static_cast<uint64_t>(leading) >> 4 << 16 |
           static_cast<uint64_t>(stride) >> 4 << 32 | uint64_t{1} << 62;
  }
};

// What a lane holds of [64, 8 kTiles]: of the 16 rows of its warp what MmaBf16
// gives it of each 8 columns.
template <int kTiles>
using WarpgroupSums = float[kTiles][4];

}  // namespace gradwire

#ifdef __CUDACC__

namespace gradwire {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif

// As Launch, of a kernel for sm_90a, which has up to 227 KiB of shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchWarpgroups(void (*kernel)(Parameters...), dim3 grid,
                             dim3 block, std::size_t shared_bytes,
                             cudaStream_t stream, Arguments... arguments) {
  return Launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

// What the thread has written to shared memory, products that begin after the
// next barrier see. Copies are to be waited for before.
__device__ inline void ShowToProducts() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
// Between what used the registers of sums and operands before and the products
// that come.
__device__ inline void BeginProducts() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ inline void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits for all groups but the newest kBut.
template <int kBut>
__device__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kBut) : "memory");
}
// Keeps the assembler from waiting for products before what `value` is made of
// is computed: it moves waits up as far as it may, and without this the
// exponentials of attention's forward come after the wait that they are to
// fill. `value` is not negative; the barrier is never reached.
__device__ inline void ComputeBeforeWaiting(float value) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n"
      "@p bar.sync 1, 32;\n}\n" ::"f"(value)
      : "memory");
}
// Keeps the compiler from moving a use of the sums to before this.
template <int kTiles>
__device__ void HoldSums(WarpgroupSums<kTiles>& d) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    asm volatile(""
                 : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]),
                   "+f"(d[n][3])::"memory");
  }
}

// clang-format off
#define GRADWIRE_SUMS8 "%0,%1,%2,%3,%4,%5,%6,%7,"                              \
  "%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"             \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define GRADWIRE_SUMS16 GRADWIRE_SUMS8 ",%32,%33,%34,%35,%36,%37,%38,%39,"     \
  "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"           \
  "%56,%57,%58,%59,%60,%61,%62,%63"
#define GRADWIRE_SUM(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define GRADWIRE_OPERANDS8 GRADWIRE_SUM(0), GRADWIRE_SUM(1), GRADWIRE_SUM(2),  \
  GRADWIRE_SUM(3), GRADWIRE_SUM(4), GRADWIRE_SUM(5), GRADWIRE_SUM(6),          \
  GRADWIRE_SUM(7)
#define GRADWIRE_OPERANDS16 GRADWIRE_OPERANDS8, GRADWIRE_SUM(8),               \
  GRADWIRE_SUM(9), GRADWIRE_SUM(10), GRADWIRE_SUM(11), GRADWIRE_SUM(12),       \
  GRADWIRE_SUM(13), GRADWIRE_SUM(14), GRADWIRE_SUM(15)
// clang-format on

// d (+)= a b^T, 16 terms: `a` is Rows of 64 rows, `b` Rows of 8 kTiles; d is
// written if not `add`.
template <int kTiles>
__device__ void MultiplyRows(WarpgroupSums<kTiles>& d, uint64_t a, uint64_t b,
                             bool add) {
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (kTiles == 8) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{" GRADWIRE_SUMS8 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : GRADWIRE_OPERANDS8
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{" GRADWIRE_SUMS16 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : GRADWIRE_OPERANDS16
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  }
}

// d (+)= a b, 16 terms: of `a` each lane holds what MmaBf16 takes of its warp's
// 16 rows, `b` is Columns of 8 kTiles.
template <int kTiles>
__device__ void MultiplyColumns(WarpgroupSums<kTiles>& d,
                                const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (kTiles == 8) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{" GRADWIRE_SUMS8 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
        : GRADWIRE_OPERANDS8
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
          "r"(static_cast<int>(add)));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{" GRADWIRE_SUMS16 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
        : GRADWIRE_OPERANDS16
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
          "r"(static_cast<int>(add)));
  }
}

#undef GRADWIRE_SUMS8
#undef GRADWIRE_SUMS16
#undef GRADWIRE_SUM
#undef GRADWIRE_OPERANDS8
#undef GRADWIRE_OPERANDS16

}  // namespace gradwire

#else

#include "tests/cuda_emulator/warpgroup.h"

#endif
