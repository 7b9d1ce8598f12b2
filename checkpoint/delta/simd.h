// SPDX-License-Identifier: Apache-2.0
// The vector targets of the delta codec. Include before any Highway header.
//
// AVX3_DL is the one that compresses 16-bit lanes in one instruction; below it
// plain AVX-512, AVX2 and a portable target.
#pragma once

#define HWY_WANT_AVX3_DL
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
