// SPDX-License-Identifier: Apache-2.0
// The vector targets that the CPU backend is compiled for. Include before any
// Highway header.
//
// Three are enough: AVX-512, AVX2 and a portable one. The rest would only add
// build time, since no machine that trains lacks AVX2.
#pragma once

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
