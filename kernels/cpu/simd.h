// SPDX-License-Identifier: Apache-2.0
// The vector targets that the CPU backend is compiled for. Include before any
// Highway header.
//
// Three are enough: AVX-512, AVX2 and a portable one. The rest would only add
// build time, since no machine that trains lacks AVX2.
#pragma once

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)

namespace gradwire {

// Whether the processor rounds float32 to bf16 in one instruction.
#if defined(__x86_64__)
inline const bool kHasBf16Convert = __builtin_cpu_supports("avx512bf16");
#else
inline constexpr bool kHasBf16Convert = false;
#endif

}  // namespace gradwire
