// SPDX-License-Identifier: Apache-2.0
// What a .cu file is written with. nvcc makes a kernel of it; a C++ compiler
// makes of the same file one that runs on the host (tests/cuda_emulator), which
// knows these names and CUDA's barriers, votes and shuffles over whole warps.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "device/cuda/launch_record.h"

namespace gradwire {

// Queues kernel(arguments...) with `shared_bytes` of dynamic shared memory,
// which is all the shared memory that a kernel may have: at most 99 KiB, but
// for kernels of warpgroups (warpgroup.h).
template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  const auto launch = [=](cudaStream_t to) {
    // What a kernel has without being asked.
    if (shared_bytes > std::size_t{48} << 10) {
      const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(shared_bytes));
      if (error != cudaSuccess) return error;
    }
    kernel<<<grid, block, shared_bytes, to>>>(arguments...);
    return cudaGetLastError();
  };
  return QueueKernel(kernel, grid, block, shared_bytes, stream, launch,
                     arguments...);
}

// As Launch, of a kernel whose threads neither wait for each other nor share
// memory: the emulator needs no fiber for each of them then.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchIndependent(void (*kernel)(Parameters...), dim3 grid,
                              dim3 block, cudaStream_t stream,
                              Arguments... arguments) {
  return Launch(kernel, grid, block, 0, stream, arguments...);
}

// Elements in shared memory. What is read has been written before.
template <typename T>
class SharedArray {
 public:
  SharedArray() = default;
  __device__ SharedArray(T* data, int size) : data_(data), size_(size) {}

  __device__ int size() const { return size_; }
  __device__ T& operator[](int i) const { return data_[i]; }
  // Elements from i on as one V; i * sizeof(T) is a multiple of sizeof(V).
  template <typename V>
  __device__ V Load(int i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  template <typename V>
  __device__ void Store(int i, const V& value) const {
    *reinterpret_cast<V*>(data_ + i) = value;
  }
  __device__ SharedArray Slice(int begin, int n) const {
    return SharedArray(data_ + begin, n);
  }
  // For instructions that take an address of the shared window.
  __device__ uint32_t Address(int i) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(data_ + i));
  }

 private:
  T* data_ = nullptr;
  int size_ = 0;
};

// Hands out the block's dynamic shared memory from its beginning.
class SharedMemory {
 public:
  // Aligned to kAlign bytes, at most 1024.
  template <typename T, uint32_t kAlign = 128>
  __device__ SharedArray<T> Take(int n) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    const uint32_t offset = (used_ + kAlign - 1) / kAlign * kAlign;
    used_ = offset + static_cast<uint32_t>(sizeof(T)) * n;
    return SharedArray<T>(reinterpret_cast<T*>(dynamic_shared + offset), n);
  }

 private:
  uint32_t used_ = 0;
};

// ---- Asynchronous copies (sm_80) --------------------------------------------

// 16 bytes from global memory to elements i.. of `to`, both aligned to 16
// bytes; zeros if not `there`, and `from` is not read. The copies of a group
// have been made when the thread has waited for them; others see them after a
// barrier beyond that.
template <typename T>
__device__ void CopyAsync16(SharedArray<T> to, int i, const T* from,
                            bool there = true) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to.Address(i)),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
}
// The same of 8 bytes, aligned to 8.
template <typename T>
__device__ void CopyAsync8(SharedArray<T> to, int i, const T* from,
                           bool there = true) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(to.Address(i)),
      "l"(from), "r"(there ? 8 : 0)
      : "memory");
}
// Ends the thread's group.
__device__ inline void CommitAsync() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits for all groups of the thread but the newest kBut.
template <int kBut>
__device__ void WaitAsync() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kBut) : "memory");
}

// ---- Tensor cores (sm_80) ---------------------------------------------------

// Matrices of 8 x 8 elements of 16 bits, one for each r. Lanes 8 m .. 8 m + 7
// name the first elements of the rows of matrix m (16 bytes each). Lane l gets
// the elements [l / 4][2 (l % 4)] and the next in the low and high half, or,
// transposed, [2 (l % 4)][l / 4] and the one below.
template <typename T>
__device__ void LdMatrixX4(uint32_t (&r)[4], SharedArray<T> from, int i) {
  static_assert(sizeof(T) == 2);
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
      : "r"(from.Address(i))
      : "memory");
}
template <typename T>
__device__ void LdMatrixX4Transposed(uint32_t (&r)[4], SharedArray<T> from,
                                     int i) {
  static_assert(sizeof(T) == 2);
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, "
      "[%4];\n"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
      : "r"(from.Address(i))
      : "memory");
}
template <typename T>
__device__ void LdMatrixX2(uint32_t (&r)[2], SharedArray<T> from, int i) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(from.Address(i))
               : "memory");
}
template <typename T>
__device__ void LdMatrixX2Transposed(uint32_t (&r)[2], SharedArray<T> from,
                                     int i) {
  static_assert(sizeof(T) == 2);
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
      : "=r"(r[0]), "=r"(r[1])
      : "r"(from.Address(i))
      : "memory");
}

// d += a b: a [16, 16] and b [16, 8] in bf16, d [16, 8] in float32. With
// g = lane / 4 and c = 2 (lane % 4), the lane holds
//   a[0] (g, c..c+1)  a[1] (g+8, c..)  a[2] (g, c+8..)  a[3] (g+8, c+8..)
//   b[0] (c..c+1, g)  b[1] (c+8.., g)
//   d[0], d[1] (g, c..c+1)  d[2], d[3] (g+8, c..c+1)
__device__ inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4],
                               const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Both rounded to nearest even: `low` in the low half.
__device__ inline uint32_t PackBf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- Global memory ----------------------------------------------------------

// *to = value, in one instruction for 8 or 16 bytes: of an assignment under a
// condition the compiler makes one for each element.
template <typename V>
__device__ void StoreWhole(V* to, const V& value) {
  static_assert(alignof(V) == sizeof(V));
  if constexpr (sizeof(V) == 16) {
    const auto v = __builtin_bit_cast(uint4, value);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else if constexpr (sizeof(V) == 8) {
    const auto v = __builtin_bit_cast(uint2, value);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(to), "r"(v.x),
                 "r"(v.y)
                 : "memory");
  } else {
    *to = value;
  }
}

// ---- Functions --------------------------------------------------------------

// 2^x in one instruction: relative error below 2^-22, 0 where float32 would be
// denormal.
__device__ inline float Exp2Approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace gradwire

#else

#include "tests/cuda_emulator/kernel.h"

#endif
