// SPDX-License-Identifier: Apache-2.0
// Vector functions that several ops share. Included once per target, inside
// foreach_target.
#if defined(GRADWIRE_KERNELS_CPU_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GRADWIRE_KERNELS_CPU_SIMD_MATH_INL_H_
#undef GRADWIRE_KERNELS_CPU_SIMD_MATH_INL_H_
#else
#define GRADWIRE_KERNELS_CPU_SIMD_MATH_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "device/dtype.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd.h"

#undef GRADWIRE_AVX512
#define GRADWIRE_AVX512 (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3)

HWY_BEFORE_NAMESPACE();
namespace gradwire {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// e^x within 2 ulp for -87 <= x <= 88; below, some value in (0, 2e-38]. NaN
// stays NaN. Softmax needs no more, and this is half the work of a general exp.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SoftmaxExp(D d, V x) {
  const hn::Rebind<int32_t, D> di;
  // Max returns its second argument if one is NaN.
  x = hn::Max(hn::Set(d, -87.0f), x);
  // x = q ln 2 + r. Adding 1.5 * 2^23 rounds to an integer, which then lies in
  // the low bits; 127 more make it the exponent field of 2^q.
  const V round = hn::Set(d, 12582912.0f + 127.0f);
  const V shifted = hn::MulAdd(x, hn::Set(d, 1.44269504f), round);
  const V q = hn::Sub(shifted, round);
  // ln 2 in two parts; the first has 9 bits, so q times it is exact.
  V r = hn::NegMulAdd(q, hn::Set(d, 0.693359375f), x);
  r = hn::NegMulAdd(q, hn::Set(d, -2.12194440e-4f), r);
  // Least maximal relative error of 1 + r + r^2 p(r) over |r| <= ln(2) / 2,
  // which is 4e-9.
  V p = hn::Set(d, 1.381446490995586e-3f);
  p = hn::MulAdd(p, r, hn::Set(d, 8.368780836462975e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.166839271783829e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.666651964187622e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.999999403953552e-1f));
  p = hn::MulAdd(hn::Mul(r, r), p, r);
  p = hn::Add(p, hn::Set(d, 1.0f));
  const V power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
  return hn::Mul(p, power);
}

// 2^x for x <= 0 within a few roundings: what is left when the logarithm's base
// goes into a factor that the caller multiplies by anyway. Exactly 1 at 0; NaN
// stays NaN; hidden scores of -infinity may give 0 or some value up to 2e-38.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SoftmaxExp2(D d, V x) {
#if GRADWIRE_AVX512
  if constexpr (hn::MaxLanes(D()) == 16) {
    // x - floor(x), and p 2^floor(x): an instruction each.
    const V r{_mm512_reduce_ps(x.raw, 1)};
    // Least maximal relative error of 1 + r p(r) over 0 <= r <= 1: 2e-9.
    V p = hn::Set(d, 2.1612919e-4f);
    p = hn::MulAdd(p, r, hn::Set(d, 1.2467845e-3f));
    p = hn::MulAdd(p, r, hn::Set(d, 9.6754516e-3f));
    p = hn::MulAdd(p, r, hn::Set(d, 5.5485282e-2f));
    p = hn::MulAdd(p, r, hn::Set(d, 2.4022931e-1f));
    p = hn::MulAdd(p, r, hn::Set(d, 6.9314706e-1f));
    p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
    return V{_mm512_scalef_ps(p.raw, x.raw)};
  } else {
    return SoftmaxExp(d, hn::Mul(x, hn::Set(d, 0.693147181f)));
  }
#else
  return SoftmaxExp(d, hn::Mul(x, hn::Set(d, 0.693147181f)));
#endif
}

template <class D>
HWY_INLINE hn::Vec<D> LoadF32(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadF32(D d, const BFloat16* from) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

template <class D>
HWY_INLINE void StoreF32(D d, hn::Vec<D> v, float* to) {
  hn::StoreU(v, d, to);
}
// Rounds to nearest, ties to even; NaN stays NaN.
template <class D>
HWY_INLINE void StoreRounded(D, hn::Vec<D> v, BFloat16* to) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1u));
  auto top =
      hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fffu))));
  const auto nan = hn::Or(hn::ShiftRight<16>(bits), hn::Set(d32, 0x40u));
  top = hn::IfThenElse(hn::RebindMask(d32, hn::IsNaN(v)), nan, top);
  hn::StoreU(hn::TruncateTo(d16, top), d16, reinterpret_cast<uint16_t*>(to));
}
template <class D>
HWY_INLINE void StoreRounded(D d, hn::Vec<D> v, float* to) {
  hn::StoreU(v, d, to);
}
// The same but for values below 2^-126, which may become 0.
template <class D>
HWY_INLINE void StoreF32(D d, hn::Vec<D> v, BFloat16* to) {
#if GRADWIRE_AVX512
  if constexpr (hn::MaxLanes(D()) == 16) {
    if (HWY_LIKELY(kHasBf16Convert)) {
      // Highway's flags for this target do not include the instruction.
      __m256i rounded;
      asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v.raw));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
      return;
    }
  }
#endif
  StoreRounded(d, v, to);
}

// The first n lanes, the others 0. Reads nothing beyond them.
template <class D, class T>
HWY_INLINE hn::Vec<D> LoadFirst(D d, const T* from, int64_t n) {
  if (n >= static_cast<int64_t>(hn::Lanes(d))) return LoadF32(d, from);
  HWY_ALIGN T lanes[hn::MaxLanes(d)] = {};
  std::copy_n(from, n, lanes);
  return LoadF32(d, lanes);
}

// Stores the first n lanes. `kExact` keeps bf16's smallest values.
template <bool kExact = false, class D, class T>
HWY_INLINE void StoreFirst(D d, hn::Vec<D> v, int64_t n, T* to) {
  const auto store = [&](T* at) HWY_ATTR {
    if constexpr (kExact) {
      StoreRounded(d, v, at);
    } else {
      StoreF32(d, v, at);
    }
  };
  if (n >= static_cast<int64_t>(hn::Lanes(d))) return store(to);
  HWY_ALIGN T lanes[hn::MaxLanes(d)];
  store(lanes);
  std::copy_n(lanes, n, to);
}

// A float32 from the halves of kernels/optimizer_state.h, and back.
template <class D>
HWY_INLINE hn::Vec<D> LoadHalves(D d, const BFloat16* high,
                                 const int16_t* low) {
  const hn::Rebind<int16_t, D> d16;
  const hn::Rebind<int32_t, D> d32;
  const auto top = hn::BitCast(d32, LoadF32(d, high));
  return hn::BitCast(d, hn::Add(top, hn::PromoteTo(d32, hn::LoadU(d16, low))));
}
template <class D>
HWY_INLINE void StoreHalves(D, hn::Vec<D> v, BFloat16* high, int16_t* low) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::BitCast(d32, v);
  const auto is_nan = hn::RebindMask(d32, hn::IsNaN(v));
  const auto nan = hn::Or(hn::ShiftRight<16>(bits), hn::Set(d32, 0x40u));
  auto top = hn::ShiftRight<16>(hn::Add(bits, hn::Set(d32, 0x8000u)));
  top = hn::IfThenElse(is_nan, nan, top);
  hn::StoreU(hn::TruncateTo(d16, top), d16, reinterpret_cast<uint16_t*>(high));
  if (low == nullptr) return;
  hn::StoreU(hn::TruncateTo(d16, hn::IfThenZeroElse(is_nan, bits)), d16,
             reinterpret_cast<uint16_t*>(low));
}

// 1 / (1 + e^-x), without overflow on either side.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Sigmoid(D d, V x) {
  const V one = hn::Set(d, 1.0f);
  const V e = SoftmaxExp(d, hn::Neg(hn::Abs(x)));
  const V top = hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one);
  return hn::Div(top, hn::Add(one, e));
}

}  // namespace HWY_NAMESPACE
}  // namespace gradwire
HWY_AFTER_NAMESPACE();

#endif  // include guard toggle
